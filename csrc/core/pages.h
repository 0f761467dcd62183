// Large pages for large arrays: a fresh page of 4 KiB costs 2 µs on a virtual machine.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>

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

// Room for `count` numbers, of any value, in whole cache lines.
template <class T>
class LargeArray {
 public:
  explicit LargeArray(int64_t count) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    data_ = static_cast<T*>(std::aligned_alloc(kLine, static_cast<size_t>(bytes)));
    if (bytes > 0 && !data_) throw std::bad_alloc();
    ask_for_large_pages(data_, bytes);
  }
  LargeArray(const LargeArray&) = delete;
  LargeArray& operator=(const LargeArray&) = delete;
  ~LargeArray() {
    std::free(data_);
  }
  T* data() const {
    return data_;
  }

 private:
  T* data_;
};

}  // namespace wscl
