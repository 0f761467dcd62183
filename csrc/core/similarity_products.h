// The three products of the similarity pass, as register tiles of one instruction set.
//
// A tile's rows come as steps along what is summed: one number, or what one instruction multiplies and adds.
// `Math` says which: Numbers here, Pairs of bfloat16 in similarity_dot.h.
#pragma once

#include "simd.h"
#include "similarity.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int kKeys = WSCL_KEY_TILE;  // rows of y in a register tile of the first product
#if defined(WSCL_BFLOAT16_TILES)
constexpr int kMostVectors = 2;  // of a panel: 2 × 2 tiles of sums
#else
constexpr int kMostVectors = 3;  // of a panel: kKeys × 3 accumulators
#endif
template <class T>
constexpr int kPanel = kMostVectors * Simd<T>::kWidth;
// Rows of x in a register tile of the second product: × 2 accumulators.
template <class T, int kVectorsX>
constexpr int kGatherRows = kVectorsX == kMostVectors             ? kRows
                            : kKeys < kVectorsX * Simd<T>::kWidth ? kKeys
                                                                  : kVectorsX * Simd<T>::kWidth;

constexpr int64_t kStretch = 16;  // steps of the first product between two looks ahead

template <class Number>
struct Numbers {
  using T = Number;
  using Element = T;                  // of a row as it stands
  using Step = T;                     // of a row as a tile reads it
  static constexpr int kNumbers = 1;  // of a step
  using Lanes = Vector<T>;

  static WSCL_INLINE Lanes lanes(const void* steps) {
    return load(static_cast<const T*>(steps));
  }
  static WSCL_INLINE Lanes spread(const void* step) {
    return broadcast(*static_cast<const T*>(step));
  }
  static WSCL_INLINE Vector<T> add(Vector<T> sum, Lanes a, Lanes b) {
    return sum + a * b;
  }
};

// Where row r of a product's right side is: at its own place, or one of a matrix.
template <class Step>
struct RowList {
  const Step* const* rows;
  WSCL_INLINE const Step* operator()(int64_t r) const {
    return rows[r];
  }
};
template <class Step>
struct RowMatrix {
  const Step* data;
  int64_t stride;
  WSCL_INLINE const Step* operator()(int64_t r) const {
    return data + r * stride;
  }
};

// Rows that come next are on their way from memory while the tiles at hand are computed.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* const* rows = nullptr;  // the next ones
  int64_t count = 0, bytes = 0;       // of them, of each of them
  int64_t row = 0, byte = 0;          // where it stands
  int64_t lines = 0;                  // at a time

  template <bool kWrite>
  WSCL_INLINE void fetch() {
    for (int64_t left = lines; left > 0 && row < count; --left) {
      __builtin_prefetch(rows[row] + byte, kWrite, 2);
      byte += kLine;
      if (byte < bytes) continue;
      byte = 0;
      ++row;
    }
  }
};

// What will be read, and what will be written.
struct Aheads {
  Ahead read, write;

  WSCL_INLINE void fetch() {
    read.fetch<false>();
    write.fetch<true>();
  }
};

// out[kKeys][vectors · kWidth] = the first product of kKeys rows of y with a panel.
template <class Math, int kVectorsX, class T = typename Math::T>
WSCL_INLINE void logits_tile(const typename Math::Element* const* y, const typename Math::Step* __restrict x,
                             int64_t steps, T* __restrict out, Aheads& ahead) {
  constexpr int kWidth = Simd<T>::kWidth;
  const typename Math::Element* row[kKeys];
  Vector<T> sum[kKeys][kVectorsX];
#pragma GCC unroll 16
  for (int k = 0; k < kKeys; ++k) {
    row[k] = y[k];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsX; ++v) sum[k][v] = Vector<T>{};
  }
  for (int64_t p = 0; p < steps;) {
    ahead.fetch();
    for (const int64_t end = smaller(p + kStretch, steps); p < end; ++p) {
      typename Math::Lanes lanes[kVectorsX];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsX; ++v) lanes[v] = Math::lanes(x + v * kWidth);
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k) {
        const typename Math::Lanes key = Math::spread(row[k] + p * Math::kNumbers);
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsX; ++v) sum[k][v] = Math::add(sum[k][v], key, lanes[v]);
      }
      x += kVectorsX * kWidth;
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsX; ++v) store(out + (k * kVectorsX + v) * kWidth, sum[k][v]);
}

// Similarities of `count` rows of y to a panel. Whole tiles: y has pointers, and `out` has room, for them.
template <class Math, int kVectorsX, class T = typename Math::T>
__attribute__((noinline)) void logits_panel(const typename Math::Element* const* y, int64_t count,
                                            const typename Math::Step* x, int64_t steps, T* out,
                                            Aheads& ahead) {
  for (int64_t k = 0; k < count; k += kKeys)
    logits_tile<Math, kVectorsX>(y + k, x, steps, out + k * kVectorsX * Simd<T>::kWidth, ahead);
}

// out[kTile][kVectors of the rows] += Σ_s weight(r, s) · rows(s)[column…], with
// weight(r, s) = weights[r · kRowStep + s · kStep].
template <class Math, int kTile, int kVectors, int kRowStep, int kStep, class RowsOf,
          class T = typename Math::T>
WSCL_INLINE void weighted_tile(const typename Math::Step* __restrict weights, RowsOf rows, int64_t column,
                               int64_t steps, T* __restrict out, int64_t out_stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector<T>{};
  for (int64_t s = 0; s < steps; ++s) {
    const typename Math::Step* row = rows(s) + column;
    typename Math::Lanes value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = Math::lanes(row + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const typename Math::Lanes weight = Math::spread(weights + r * kRowStep);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Math::add(sum[r][v], weight, value[v]);
    }
    weights += kStep;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* at = out + r * out_stride + v * kWidth;
      store(at, load(at) + sum[r][v]);
    }
}

// out[panel][d] += weightsᵀ y, d a multiple of kWidth.
template <class Math, int kVectorsX, class RowsY, class T = typename Math::T>
__attribute__((noinline)) void gather_panel(const typename Math::Step* weights, RowsY y, int64_t steps,
                                            int64_t d, T* out) {
  constexpr int kWidth = Simd<T>::kWidth, kLanes = kVectorsX * kWidth, kTile = kGatherRows<T, kVectorsX>;
  static_assert(kLanes % kTile == 0, "a panel is whole tiles");
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth)
    for (int r = 0; r < kLanes; r += kTile)
      weighted_tile<Math, kTile, 2, 1, kLanes>(weights + r, y, c, steps, out + r * d + c, d);
  for (; c < d; c += kWidth)
    for (int r = 0; r < kLanes; r += kTile)
      weighted_tile<Math, kTile, 1, 1, kLanes>(weights + r, y, c, steps, out + r * d + c, d);
}

template <int kNumber>
struct Number {
  static constexpr int kValue = kNumber;
};

// How many vectors of the `left` ones a tile of the scatter takes: 3 and 3, but 4 as 2 and 2.
WSCL_INLINE int64_t scatter_vectors(int64_t left) {
  return left == 4 ? 2 : smaller(left, 3);
}

// Tiles of a scatter to `count` columns, all of them whole.
template <class T>
WSCL_INLINE int64_t scatter_tiles(int64_t count, int64_t d) {
  return count / kKeys * ((d / Simd<T>::kWidth + 2) / 3);
}

// out[count][d] += weights x over `steps` of a panel's rows, d a multiple of kWidth. Between tiles `ahead` asks
// for what will be read next.
template <class Math, int kVectorsX, class RowsX, class T = typename Math::T>
__attribute__((noinline)) void scatter_panel(const typename Math::Step* weights, RowsX x, int64_t count,
                                             int64_t steps, int64_t d, T* out, Aheads& ahead) {
  constexpr int kWidth = Simd<T>::kWidth, kStride = kVectorsX * kWidth / Math::kNumbers;
  const auto rows = [&](auto tile, int64_t k, int64_t c, int64_t vectors) {
    constexpr int kTile = decltype(tile)::kValue;
    const typename Math::Step* from = weights + k * kStride;
    T* to = out + k * d + c;
    ahead.fetch();
    if (vectors == 3)
      weighted_tile<Math, kTile, 3, kStride, 1>(from, x, c, steps, to, d);
    else if (vectors == 2)
      weighted_tile<Math, kTile, 2, kStride, 1>(from, x, c, steps, to, d);
    else
      weighted_tile<Math, kTile, 1, kStride, 1>(from, x, c, steps, to, d);
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
