// Memory of large gradients. A fresh page of 4 KiB costs 2 µs on a virtual machine, so they lie where an
// earlier one has lain, and in large pages.
#pragma once

#include <algorithm>

#include "../core/reserve.h"
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wscl::binding {

// Asks for them where the system gives them to who asks. Nothing is written, and no more memory is taken: only
// whole large pages within the tensor are meant.
inline void ask_for_large_pages(const Tensor& fresh) {
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

constexpr int64_t kLargeGradient = 1 << 18;  // bytes: smaller ones stay with the C library, larger ones may not

// Not initialised. A gradient of [rows, d] on the device of `like`.
inline Tensor new_gradient(const Tensor& like, int64_t rows, int64_t d, ScalarType dtype) {
  const int64_t size = rows * d * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  if (size < kLargeGradient) return torch::stable::new_empty(like, {rows, d}, dtype);
  const int64_t shape[] = {rows, d}, strides[] = {d, 1};
  Tensor gradient = torch::stable::from_blob(take_from_reserve(size), {shape, 2}, {strides, 2}, like.device(),
                                             dtype, give_back_to_reserve);
  ask_for_large_pages(gradient);
  return gradient;
}

}  // namespace wscl::binding
