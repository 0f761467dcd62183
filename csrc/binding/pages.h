// Large pages for large results: a fresh page of 4 KiB costs 2 µs on a virtual machine.
#pragma once

#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#endif

namespace wscl::binding {

// Asks for them where the system gives them to who asks. Nothing is written, and no more memory is taken: only
// whole large pages within the tensor are meant.
inline void ask_for_large_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace wscl::binding
