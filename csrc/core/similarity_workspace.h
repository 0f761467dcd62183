// What a chunk of the similarity pass works in: its memory, and how its operands are kept.
#pragma once

#include <cmath>
#include <cstdlib>

#include "similarity_panels.h"
#if defined(WSCL_BFLOAT16_DOT)
#include "similarity_dot.h"
#endif

namespace wscl {
namespace WSCL_ISA {

// A chunk's memory: one allocation, cut into aligned pieces.
class Workspace {
 public:
  ~Workspace() {
    std::free(memory_);
  }
  // Called once for every piece to measure, and after `allocate` once more to cut.
  template <class T>
  void cut(T*& piece, int64_t count) {
    piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
  }
  void allocate() {
    memory_ = static_cast<char*>(std::aligned_alloc(64, larger(used_, 64)));
    used_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

#if defined(WSCL_BFLOAT16_DOT)
template <class In>
constexpr bool kPairs = Is<In, BFloat16>::value;
#else
template <class In>
constexpr bool kPairs = false;
#endif
template <bool kFirst, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

template <class In>
using Element = typename Choose<kPairs<In>, In, Compute<In>>::Type;  // of y's rows, as the first product reads
template <class In>
using Packed = typename Choose<kPairs<In>, uint32_t, Compute<In>>::Type;  // of packed rows of x

}  // namespace WSCL_ISA
}  // namespace wscl
