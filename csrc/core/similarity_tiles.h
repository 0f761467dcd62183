// The register-tile matrix product of one instruction set, and the packing it wants its operands in.
#pragma once

#include "simd.h"
#include "similarity.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int kRows = WSCL_ROW_TILE;
constexpr int kVectors = 2;
template <class T>
constexpr int kColumns = kVectors * Simd<T>::kWidth;

WSCL_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

WSCL_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
WSCL_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// c[kRows][kColumns] (+)= Σ_p a(r, p) · b[p][kColumns], with a(r, p) = a[r · kRowStep + p · kDepthStep].
template <class T, int kRowStep, int kDepthStep, bool kAccumulate>
WSCL_INLINE void gemm_tile(const T* __restrict a, const T* __restrict b, int64_t depth, T* __restrict c,
                           int64_t c_stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector<T>{};
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; ++p) {
    Vector<T> column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> row = broadcast(a[r * kRowStep]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += row * column[v];
    }
    a += kDepthStep;
    b += kColumns<T>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* at = c + r * c_stride + v * kWidth;
      store(at, kAccumulate ? load(at) + sum[r][v] : sum[r][v]);
    }
}

// Rows [first, first + count) as [d][kTile], zero beyond count.
template <class T, int kTile>
void pack_rows(const Rows<T>& rows, int64_t first, int64_t count, int64_t d, T* out) {
  for (int64_t r = 0; r < kTile; ++r) {
    const T* source = r < count ? rows.row(first + r) : nullptr;
    for (int64_t p = 0; p < d; ++p) out[p * kTile + r] = source ? source[p] : T(0);
  }
}

// The same for a panel of kColumns rows, a square of kWidth × kWidth at a time. Returns the largest squared
// norm, lane by lane.
template <class T>
Vector<T> pack_columns(const Rows<T>& rows, int64_t first, int64_t count, int64_t d, T* out) {
  constexpr int kWidth = Simd<T>::kWidth;
  Vector<T> largest = {};
  for (int v = 0; v < kVectors; ++v) {
    const T* source[kWidth];
    for (int r = 0; r < kWidth; ++r)
      source[r] = v * kWidth + r < count ? rows.row(first + v * kWidth + r) : nullptr;
    const bool whole = (v + 1) * kWidth <= count;
    Vector<T> norm = {};
    for (int64_t p = 0; p < d; p += kWidth) {
      Vector<T> square[kWidth];
      const int64_t depth = smaller(kWidth, d - p);
      if (whole && depth == kWidth) {
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) square[r] = load(source[r] + p);
      } else {
        for (int r = 0; r < kWidth; ++r) {
          square[r] = Vector<T>{};
          for (int64_t e = 0; source[r] && e < depth; ++e) square[r][e] = source[r][p + e];
        }
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int e = 0; e < kWidth; ++e) {
        if (e >= depth) break;
        norm += square[e] * square[e];
        store(out + (p + e) * kColumns<T> + v * kWidth, square[e]);
      }
    }
    largest = maximum<T>(largest, norm);
  }
  return largest;
}

// Rows [first, first + count) as [panel of d][count][kColumns], zero beyond d.
template <class T>
void pack_panels(const Rows<T>& rows, int64_t first, int64_t count, int64_t d, T* out) {
  constexpr int64_t kTile = kColumns<T>;
  for (int64_t j = 0; j < count; ++j) {
    const T* source = rows.row(first + j);
    for (int64_t c = 0; c < d; c += kTile) {
      T* at = out + c * count + j * kTile;
      const int64_t width = smaller(kTile, d - c);
      if (width == kTile) {
        for (int v = 0; v < kVectors; ++v)
          store(at + v * Simd<T>::kWidth, load(source + c + v * Simd<T>::kWidth));
      } else {
        for (int64_t e = 0; e < kTile; ++e) at[e] = e < width ? source[c + e] : T(0);
      }
    }
  }
}

}  // namespace WSCL_ISA
}  // namespace wscl
