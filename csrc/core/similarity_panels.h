// The two matrix products of the similarity pass for one instruction set, and how their operands lie.
//
// Rows x come in panels of up to kPanel, one to a vector lane, packed once: [d][vectors · kWidth]. Rows y are
// read where they are, through a list of pointers: a lane never waits for a transposition, and any order of
// rows costs the same. The similarities of a block of y's rows to a panel lie as [row of y][vectors · kWidth],
// so that everything that belongs to a row of x (shift, sum, maximum) is one lane of a register.
#pragma once

#include "dtypes.h"
#include "simd.h"
#include "similarity.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int kKeys = WSCL_KEY_TILE;  // rows of y in a register tile of the first product
constexpr int kMostVectors = 3;       // of a panel: kKeys × 3 accumulators
template <class T>
constexpr int kPanel = kMostVectors * Simd<T>::kWidth;
// Rows of x in a register tile of the second product: × 2 accumulators.
template <class T, int kVectorsX>
constexpr int kGatherRows = kVectorsX == kMostVectors             ? kRows
                            : kKeys < kVectorsX * Simd<T>::kWidth ? kKeys
                                                                  : kVectorsX * Simd<T>::kWidth;

template <int kNumber>
struct Number {
  static constexpr int kValue = kNumber;
};

// One row, widened, zero from d to `padded`.
template <class In, class T>
void widen_row(const In* from, int64_t d, int64_t padded, T* to) {
  constexpr int kWidth = Simd<T>::kWidth;
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) store(to + c, load_wide<In>(from + c));
  for (; c < d; ++c) to[c] = to_compute(from[c]);
  for (; c < padded; ++c) to[c] = 0;
}

// to[c] (+)= factor · from[c] (+ offset[c]), narrowed.
template <class In, class T>
void write_row(const T* from, int64_t d, T factor, const T* offset, bool accumulate, In* to) {
  constexpr int kWidth = Simd<T>::kWidth;
  const Vector<T> factors = broadcast(factor);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    Vector<T> value = load(from + c) * factors;
    if (offset) value += load(offset + c);
    if (accumulate) value += load_wide<In>(to + c);
    store_narrow(to + c, value);
  }
  for (; c < d; ++c) {
    T value = from[c] * factor;
    if (offset) value += offset[c];
    if (accumulate) value += to_compute(to[c]);
    from_compute(value, to + c);
  }
}

// Rows [first, first + count) as [d][vectors · kWidth], zero beyond count; `row` holds kWidth rows of d padded
// to kWidth. Squared norms go to norms[vectors · kWidth].
template <class In, class T>
void pack_panel(const Rows<In>& rows, int64_t first, int64_t count, int vectors, int64_t d, T* row, T* out,
                T* norms) {
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t padded = round_up(d, kWidth);
  for (int v = 0; v < vectors; ++v) {
    for (int r = 0; r < kWidth; ++r) {
      const int64_t position = v * kWidth + r;
      if (position < count)
        widen_row<In>(rows.row(first + position), d, padded, row + r * padded);
      else
        for (int64_t c = 0; c < padded; ++c) row[r * padded + c] = 0;
    }
    Vector<T> norm = {};
    for (int64_t p = 0; p < d; p += kWidth) {
      Vector<T> square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) square[r] = load(row + r * padded + p);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int e = 0; e < kWidth; ++e) {
        if (p + e >= d) break;
        norm += square[e] * square[e];
        store(out + ((p + e) * vectors + v) * kWidth, square[e]);
      }
    }
    store(norms + v * kWidth, norm);
  }
}

// The largest norm of `count` rows of d, with what rounding adds to it; NaN or ∞ where a row has one.
template <class T, class In>
T largest_norm(const In* const* rows, int64_t count, int64_t d) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> largest = {}, spoilt = {};
  for (int64_t first = 0; first < count; first += kWidth) {
    Vector<T> sums[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const In* row = rows[smaller(first + r, count - 1)];
      Vector<T> sum = {};
      int64_t c = 0;
      for (; c + kWidth <= d; c += kWidth) sum += load_wide(row + c) * load_wide(row + c);
      for (int e = 0; c < d; ++c, ++e) sum[e] += to_compute(row[c]) * to_compute(row[c]);
      sums[r] = sum;
    }
    transpose<T>(sums);
    Vector<T> norm = {};
    for (int r = 0; r < kWidth; ++r) norm += sums[r];
    largest = maximum<T>(norm, largest);
    spoilt += norm - norm;  // NaN from then on
  }
  return std::sqrt(horizontal_max<T>(largest)) + horizontal_sum<T>(spoilt);
}

// out[kKeys][vectors · kWidth] = the first product of kKeys rows of y with a panel.
template <class T, int kVectorsX>
WSCL_INLINE void logits_tile(const T* const* y, const T* __restrict x, int64_t d, T* __restrict out) {
  constexpr int kWidth = Simd<T>::kWidth;
  const T* row[kKeys];
  Vector<T> sum[kKeys][kVectorsX];
#pragma GCC unroll 16
  for (int k = 0; k < kKeys; ++k) {
    row[k] = y[k];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsX; ++v) sum[k][v] = Vector<T>{};
  }
  for (int64_t p = 0; p < d; ++p) {
    Vector<T> lanes[kVectorsX];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsX; ++v) lanes[v] = load(x + v * kWidth);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      const Vector<T> key = broadcast(row[k][p]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsX; ++v) sum[k][v] += key * lanes[v];
    }
    x += kVectorsX * kWidth;
  }
#pragma GCC unroll 16
  for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsX; ++v) store(out + (k * kVectorsX + v) * kWidth, sum[k][v]);
}

// Similarities of `count` rows of y to a panel. Whole tiles: y has pointers, and `out` has room, for them.
template <int kVectorsX, class T>
__attribute__((noinline)) void logits_panel(const T* const* y, int64_t count, const T* x, int64_t d, T* out) {
  for (int64_t k = 0; k < count; k += kKeys)
    logits_tile<T, kVectorsX>(y + k, x, d, out + k * kVectorsX * Simd<T>::kWidth);
}

// out[kGatherRows][vectors of y] += Σ_j weights[j][r] · y_j[column…].
template <class T, int kVectorsX, int kVectorsY>
WSCL_INLINE void gather_tile(const T* __restrict weights, const T* const* y, int64_t column, int64_t count,
                             T* __restrict out, int64_t out_stride) {
  constexpr int kWidth = Simd<T>::kWidth, kTile = kGatherRows<T, kVectorsX>;
  static_assert(kVectorsX * kWidth % kTile == 0, "a panel is whole tiles");
  Vector<T> sum[kTile][kVectorsY];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) sum[r][v] = Vector<T>{};
  for (int64_t j = 0; j < count; ++j) {
    const T* row = y[j] + column;
    Vector<T> value[kVectorsY];
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) value[v] = load(row + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const Vector<T> weight = broadcast(weights[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsY; ++v) sum[r][v] += weight * value[v];
    }
    weights += kVectorsX * kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) {
      T* at = out + r * out_stride + v * kWidth;
      store(at, load(at) + sum[r][v]);
    }
}

// out[panel][d] += weightsᵀ y, d a multiple of kWidth.
template <int kVectorsX, class T>
__attribute__((noinline)) void gather_panel(const T* weights, const T* const* y, int64_t count, int64_t d,
                                            T* out) {
  constexpr int kWidth = Simd<T>::kWidth, kTile = kGatherRows<T, kVectorsX>;
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth)
    for (int r = 0; r < kVectorsX * kWidth; r += kTile)
      gather_tile<T, kVectorsX, 2>(weights + r, y, c, count, out + r * d + c, d);
  for (; c < d; c += kWidth)
    for (int r = 0; r < kVectorsX * kWidth; r += kTile)
      gather_tile<T, kVectorsX, 1>(weights + r, y, c, count, out + r * d + c, d);
}

// out[kTile][vectors of x's rows] += Σ_r weights[k][r] · x_r[column…].
template <class T, int kLanes, int kTile, int kVectors>
WSCL_INLINE void scatter_tile(const T* __restrict weights, const T* const* x, int64_t column, int64_t live,
                              T* __restrict out, int64_t out_stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[k][v] = Vector<T>{};
  for (int64_t r = 0; r < live; ++r) {
    const T* row = x[r] + column;
    Vector<T> value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load(row + v * kWidth);
#pragma GCC unroll 16
    for (int k = 0; k < kTile; ++k) {
      const Vector<T> weight = broadcast(weights[k * kLanes + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[k][v] += weight * value[v];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* at = out + k * out_stride + v * kWidth;
      store(at, load(at) + sum[k][v]);
    }
}

// How many vectors of the `left` ones a tile of the scatter takes: 3 and 3, but 4 as 2 and 2.
WSCL_INLINE int64_t scatter_vectors(int64_t left) {
  return left == 4 ? 2 : smaller(left, 3);
}

// out[count][d] += weights x over the panel's `live` lanes, d a multiple of kWidth.
template <int kVectorsX, class T>
__attribute__((noinline)) void scatter_panel(const T* weights, const T* const* x, int64_t count, int64_t live,
                                             int64_t d, T* out) {
  constexpr int kWidth = Simd<T>::kWidth, kLanes = kVectorsX * kWidth;
  const auto rows = [&](auto tile, int64_t k, int64_t c, int64_t vectors) {
    constexpr int kTile = decltype(tile)::kValue;
    const T* from = weights + k * kLanes;
    T* to = out + k * d + c;
    if (vectors == 3)
      scatter_tile<T, kLanes, kTile, 3>(from, x, c, live, to, d);
    else if (vectors == 2)
      scatter_tile<T, kLanes, kTile, 2>(from, x, c, live, to, d);
    else
      scatter_tile<T, kLanes, kTile, 1>(from, x, c, live, to, d);
  };
  for (int64_t c = 0, vectors; c < d; c += vectors * kWidth) {
    vectors = scatter_vectors((d - c) / kWidth);
    int64_t k = 0;
    for (; k + kKeys <= count; k += kKeys) rows(Number<kKeys>(), k, c, vectors);
    for (; k < count; ++k) rows(Number<1>(), k, c, vectors);
  }
}

}  // namespace WSCL_ISA
}  // namespace wscl
