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
  // Multiply-adds of one column that may lie side by side in a vector; see CentroidTable::terms.
  static constexpr int kMostTerms = sizeof(T) == sizeof(float) ? 4 : 1;

  static WSCL_INLINE Columns columns(const Element* p) {
    return load(p);
  }
  static WSCL_INLINE Vector<T> multiply_add(Vector<T> sum, const Element* row, Columns columns) {
    return sum + broadcast(*row) * columns;
  }
  template <int kTerms>
  static WSCL_INLINE Vector<T> multiply_add_terms(Vector<T> sum, const Element* row, Columns columns) {
    return sum + repeat<T, kTerms>(row) * columns;
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

// What meets in a tile: kRows rows at most, and a panel of columns.
template <class Op>
struct Tile {
  using Number = typename Op::Number;
  using Element = typename Op::Element;

  const Element* rows;
  int64_t stride, count;  // of the rows
  const Element* panel;
  int64_t depth;
  const Number* offset;  // of the panel's columns
  int64_t vector;        // which of the group its first vector is
  typename Simd<Number>::Bits index_mask;
  RowState<Number>* states;

  WSCL_INLINE void find_rows(const Element** row) const {
    for (int64_t r = 0; r < kRows; ++r) row[r] = rows + smaller(r, count - 1) * stride;
  }
};

// Scores of a tile whose panel has kCount vectors of columns.
template <int kCount, class Op>
WSCL_INLINE void score_tile(Op, const Tile<Op>& tile) {
  using T = typename Op::Number;
  constexpr int kWidth = Simd<T>::kWidth;
  const typename Op::Element *rows[kRows], *panel = tile.panel;
  tile.find_rows(rows);
  Vector<T> sum[kRows][kCount];
#pragma GCC unroll 2
  for (int v = 0; v < kCount; ++v) {
    const Vector<T> start = -load(tile.offset + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][v] = start;
  }
#pragma GCC unroll 2
  for (int64_t p = 0; p < tile.depth; p += Op::kStep) {
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
  for (int r = 0; r < kRows; ++r) take_scores<T, kCount>(sum[r], tile.vector, tile.index_mask, tile.states[r]);
}

// The same for the last vector of columns, of which each takes kTerms lanes.
template <int kTerms, class Op>
WSCL_INLINE void score_narrow_tile(Op, const Tile<Op>& tile) {
  using T = typename Op::Number;
  const typename Op::Element *rows[kRows], *panel = tile.panel;
  tile.find_rows(rows);
  Vector<T> sum[kRows] = {};
  for (int64_t p = 0; p < tile.depth; p += Op::kStep * kTerms) {
    const typename Op::Columns columns = Op::columns(panel);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      sum[r] = Op::template multiply_add_terms<kTerms>(sum[r], rows[r] + p, columns);
    panel += Op::kStep * Simd<T>::kWidth;
  }
  const Vector<T> offset = load(tile.offset);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vector<T> score = sums_of_neighbours<T, kTerms>(sum[r]) - offset;
    take_scores<T, 1>(&score, tile.vector, tile.index_mask, tile.states[r]);
  }
}

}  // namespace WSCL_ISA
}  // namespace wscl
