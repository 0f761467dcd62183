// The pass of kmeans_potentials.h for one instruction set (included by kmeans_typed.h).
//
// In PyTorch:   distance = torch.minimum(nearest, torch.cdist(candidates, x).square())
//               potential = distance @ weights
//
// Tile map. As many rows as a vector has lanes are taken at once; they stay in L1 while each candidate meets
// them: a difference and a multiply-add for every kWidth elements, one accumulator a row, whose lanes
// are folded together so that the rows' distances are one vector.
//
// Memory traffic: x once, which is what takes the time: m candidates cost 2 m operations for each load from
// memory. Distances are written once, m numbers a row.
#pragma once

#include "kmeans_potentials.h"
#include "kmeans_rows.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

template <class T, bool kScaled>
WSCL_INLINE Vector<T> square_apart(Vector<T> row, T scale, Vector<T> other) {
  const Vector<T> apart = kScaled ? row * broadcast(scale) - other : other - row;
  return apart * apart;
}

// ‖scale_i row_i − candidate‖² for kWidth rows, lane by lane.
template <class T, bool kScaled>
WSCL_INLINE Vector<T> squares_to(const T* const* rows, const T* scale, const T* candidate, int64_t d) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) sum[i] = Vector<T>{};
  const int64_t whole = d / kWidth * kWidth;
  for (int64_t c = 0; c < whole; c += kWidth) {
    const Vector<T> other = load(candidate + c);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sum[i] += square_apart<T, kScaled>(load(rows[i] + c), scale[i], other);
  }
  if (whole < d) {
    const Vector<T> other = load_part(candidate + whole, d - whole);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      sum[i] += square_apart<T, kScaled>(load_part(rows[i] + whole, d - whole), scale[i], other);
  }
  return sums_of<T>(sum);
}

// Rows [row0, row1); adds to potential [m].
template <class T>
void kmeans_potentials_part(const PotentialsProblem<T>& p, int64_t row0, int64_t row1, double* potential) {
  constexpr int kWidth = Simd<T>::kWidth, kHalf = Simd<double>::kWidth;
  const T* const direct = rows_of<T>(p.x);
  Memory memory;
  T* scratch;              // [kWidth][d] rows that had to be converted
  Vector<double>* totals;  // [m]
  memory.reserve(&scratch, direct ? 1 : kWidth * p.d);
  memory.reserve(&totals, p.m);
  memory.allocate();
  for (int64_t j = 0; j < p.m; ++j) totals[j] = Vector<double>{};
  for (int64_t row = row0; row < row1; row += kWidth) {
    const int64_t count = smaller(kWidth, row1 - row);
    const T* rows[kWidth];  // beyond `count` the last one again, without weight
    T scale[kWidth];
    double weights[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t at = row + smaller(i, count - 1);
      if (direct)
        rows[i] = direct + at * p.x.row_stride;
      else
        rows[i] = i < count ? fetch(p.x, at, p.d, scratch + i * p.d) : rows[count - 1];
      scale[i] = p.scale ? p.scale[at] : T(1);
      weights[i] = i >= count ? 0 : p.weights ? p.weights[at] : 1;
    }
    if (direct && row + 2 * kWidth <= row1)  // the next rows, on their way while these are used
      for (int64_t i = 0; i < kWidth; ++i)
        for (int64_t c = 0; c < p.d; c += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(rows[i] + kWidth * p.x.row_stride + c);
    const Vector<T> nearest = load_part(p.nearest + row, count);
    for (int64_t j = 0; j < p.m; ++j) {
      const T* candidate = p.candidates + j * p.d;
      const Vector<T> square = p.scale ? squares_to<T, true>(rows, scale, candidate, p.d)
                                       : squares_to<T, false>(rows, scale, candidate, p.d);
      T distance[kWidth];
      store(distance, minimum<T>(square, nearest));
      std::memcpy(p.distance + j * p.x.count + row, distance, count * sizeof(T));
      for (int h = 0; h < kWidth; h += kHalf) totals[j] += load(weights + h) * widen(distance + h);
    }
  }
  for (int64_t j = 0; j < p.m; ++j) potential[j] += horizontal_sum<double>(totals[j]);
}

}  // namespace WSCL_ISA
}  // namespace wscl
