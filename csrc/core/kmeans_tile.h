// The register tile of k-means for one instruction set: scores of kRows points against a panel of centroids,
// and in its epilogue the best and the second best score of every row, lane by lane. The operands say how the
// scores are made: here by multiply-adds of vectors, in kmeans_avx512amx.cpp by tiles.
#pragma once

#include "kmeans_pass.h"
#include "kmeans_simd.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

// Operands of the product in the precision of the scores.
template <class T>
struct FullOperands {
  using Number = T;
  using Element = T;
  using Columns = Vector<T>;
  struct InUse {};  // what a thread holds while it multiplies
  static constexpr bool kRounds = false;
  static constexpr int kStep = 1;     // elements of a row that meet in one multiply-add
  static constexpr int kStretch = 1;  // of which the depth is a multiple

  static WSCL_INLINE Columns columns(const Element* p) {
    return load(p);
  }
  static WSCL_INLINE Vector<T> multiply_add(Vector<T> sum, const Element* row, Columns columns) {
    return sum + broadcast(*row) * columns;
  }
  static WSCL_INLINE Element round(T value) {
    return value;
  }
  // Writes a vector as elements, and returns what they are.
  static WSCL_INLINE Vector<T> write(Element* out, Vector<T> values) {
    store(out, values);
    return values;
  }
};

// What is known of a row's scores so far. Lane l has seen columns l, l + kWidth, l + 2 · kWidth, …
//
// Within a group of at most kGroupVectors vectors of columns the low bits of a score give way to its vector's
// number in the group, so that the largest score brings its column along; `vector` is taken from there.
template <class T>
struct RowState {
  Vector<T> best, second;
  typename Simd<T>::Bits vector;  // of the best: its column is vector · kWidth + lane
};

// kCount vectors of scores, of which the first is the group's `vector`, become part of a row's state.
template <class T, int kCount>
WSCL_INLINE void take_scores(const Vector<T>* scores, int64_t vector, typename Simd<T>::Bits index_mask,
                             RowState<T>& state) {
  using Bits = typename Simd<T>::Bits;
  Vector<T> best = state.best, second = state.second;
#pragma GCC unroll 2
  for (int v = 0; v < kCount; ++v) {
    const Bits index = Bits{} + static_cast<decltype(index_mask[0] + 0)>(vector + v);
    const Vector<T> key = with_bits<T>(scores[v], index_mask, index);
    second = larger_of<T>(second, minimum<T>(key, best));  // of a key that is NaN nothing stays
    best = larger_of<T>(key, best);
  }
  state.best = best;
  state.second = second;
}

// Scores of `count` rows, kRows of them at most and `stride` apart, against kCount vectors of columns.
template <int kCount, class Op>
WSCL_INLINE void score_tile(Op, const typename Op::Element* first, int64_t stride, int64_t count,
                            const typename Op::Element* panel, int64_t depth, const typename Op::Number* offset,
                            int64_t vector, typename Simd<typename Op::Number>::Bits index_mask,
                            RowState<typename Op::Number>* states) {
  using T = typename Op::Number;
  constexpr int kWidth = Simd<T>::kWidth;
  const typename Op::Element* rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = first + smaller(r, count - 1) * stride;
  Vector<T> sum[kRows][kCount];
#pragma GCC unroll 2
  for (int v = 0; v < kCount; ++v) {
    const Vector<T> start = -load(offset + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = start;
  }
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; p += Op::kStep) {
    typename Op::Columns columns[kCount];
#pragma GCC unroll 2
    for (int v = 0; v < kCount; ++v) columns[v] = Op::columns(panel + v * Op::kStep * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kCount; ++v) sum[r][v] = Op::multiply_add(sum[r][v], rows[r] + p, columns[v]);
    panel += kCount * Op::kStep * kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) take_scores<T, kCount>(sum[r], vector, index_mask, states[r]);
}

}  // namespace WSCL_ISA
}  // namespace wscl
