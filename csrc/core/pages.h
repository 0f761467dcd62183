// Large pages for large arrays: a fresh page of 4 KiB costs 2 µs on a virtual machine.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace wscl {

// Asks for them where the system gives them to who asks. Nothing is written, and no more memory is taken: only
// whole large pages within the array are meant.
inline void ask_for_large_pages(const void* array, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)array, (void)bytes;
#endif
}

}  // namespace wscl
