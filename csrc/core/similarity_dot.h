// The two matrix products of the similarity pass on bfloat16 rows by the dot instruction, which adds two
// products to each lane: what similarity_panels.h does in float, at twice the speed, accumulated in float.
//
// A pair is two bfloat16 in 32 bits. Pairs of the first product lie along d: a row of y already is a list of
// pairs, and is read where it is. Pairs of the second lie along y's rows, two of which are interleaved; the
// weights are rounded to bfloat16 for it.
#pragma once

#include "similarity_panels.h"

namespace wscl {
namespace WSCL_ISA {

using Pair2 = uint32_t;

WSCL_INLINE Vector<float> dot(Vector<float> sum, const void* pair, __m512i pairs) {
  int32_t broadcast;
  std::memcpy(&broadcast, pair, sizeof broadcast);
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(broadcast), (__m512bh)pairs);
}

WSCL_INLINE __m512i load_pairs(const Pair2* p) {
  return _mm512_loadu_si512(p);
}

// Rows [first, first + count) as [⌈d / 2⌉][vectors · 16] pairs, zero beyond count and d.
inline void pack_panel(const Rows<BFloat16>& rows, int64_t first, int64_t count, int vectors, int64_t d,
                       float* row, Pair2* out, float* norms) {
  constexpr int kWidth = 16;
  const int64_t padded = round_up(d, 2 * kWidth);
  BFloat16* const copy = reinterpret_cast<BFloat16*>(row);  // [kWidth][padded]
  for (int v = 0; v < vectors; ++v) {
    Vector<float> norm = {};
    for (int r = 0; r < kWidth; ++r) {
      const int64_t position = v * kWidth + r;
      const int64_t live = position < count ? d : 0;
      if (live) std::memcpy(copy + r * padded, rows.row(first + position), d * sizeof(BFloat16));
      std::memset(static_cast<void*>(copy + r * padded + live), 0, (padded - live) * sizeof(BFloat16));
      Vector<float> sum = {};
      for (int64_t c = 0; c < padded; c += kWidth) {
        const Vector<float> wide = load_wide<BFloat16>(copy + r * padded + c);
        sum += wide * wide;
      }
      norm[r] = horizontal_sum<float>(sum);
    }
    store(norms + v * kWidth, norm);
    for (int64_t p = 0; p < d; p += 2 * kWidth) {
      Vector<float> square[kWidth];  // of pairs
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) square[r] = (Vector<float>)_mm512_loadu_si512(copy + r * padded + p);
      transpose<float>(square);
#pragma GCC unroll 16
      for (int e = 0; e < kWidth; ++e) {
        if (p + 2 * e >= d) break;
        _mm512_storeu_si512(out + ((p / 2 + e) * vectors + v) * kWidth, (__m512i)square[e]);
      }
    }
  }
}

template <int kVectorsX>
__attribute__((noinline)) void logits_panel(const BFloat16* const* y, int64_t count, const Pair2* panel,
                                            int64_t d, float* out) {
  constexpr int kWidth = 16;
  for (int64_t first = 0; first < count; first += kKeys) {
    const BFloat16* row[kKeys];
    Vector<float> sum[kKeys][kVectorsX];
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      row[k] = y[first + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsX; ++v) sum[k][v] = Vector<float>{};
    }
    const Pair2* x = panel;
    for (int64_t p = 0; p < d; p += 2) {
      __m512i lanes[kVectorsX];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsX; ++v) lanes[v] = load_pairs(x + v * kWidth);
#pragma GCC unroll 16
      for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsX; ++v) sum[k][v] = dot(sum[k][v], row[k] + p, lanes[v]);
      x += kVectorsX * kWidth;
    }
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsX; ++v) store(out + ((first + k) * kVectorsX + v) * kWidth, sum[k][v]);
  }
}

// 16 bfloat16 in the low halves of 16 words.
WSCL_INLINE Simd<float>::Words in_words(__m256i halves) {
  return __builtin_convertvector((Simd<float>::Halves)halves, Simd<float>::Words);
}

WSCL_INLINE Simd<float>::Words rounded(const float* p) {
  return in_words((__m256i)_mm512_cvtneps_pbh((__m512)load(p)));
}

WSCL_INLINE void store_pairs(Pair2* out, Simd<float>::Words low, Simd<float>::Words high) {
  _mm512_storeu_si512(out, (__m512i)(low | high << 16));
}

// Rows of y two by two: [⌈count / 2⌉][padded] pairs, zero beyond count and d.
inline void interleave_rows(const BFloat16* const* y, int64_t count, int64_t d, int64_t padded, Pair2* out) {
  constexpr int kWidth = 16;
  for (int64_t k = 0; k < count; k += 2) {
    const BFloat16 *even = y[k], *odd = k + 1 < count ? y[k + 1] : nullptr;
    for (int64_t c = 0; c < padded; c += kWidth) {
      const __mmask16 live = d - c >= kWidth ? 0xffff : (1u << (d - c)) - 1;
      const auto low = in_words(_mm256_maskz_loadu_epi16(live, even + c));
      const auto high = odd ? in_words(_mm256_maskz_loadu_epi16(live, odd + c)) : Simd<float>::Words{};
      store_pairs(out + k / 2 * padded + c, low, high);
    }
  }
}

// Weights [count][lanes] become pairs [⌈count / 2⌉][lanes] in place.
inline void pair_weights(float* weights, int64_t count, int64_t lanes) {
  for (int64_t k = 0; k < count; k += 2)
    for (int64_t c = 0; c < lanes; c += 16) {
      const auto low = rounded(weights + k * lanes + c);
      const auto high = k + 1 < count ? rounded(weights + (k + 1) * lanes + c) : Simd<float>::Words{};
      store_pairs(reinterpret_cast<Pair2*>(weights) + k / 2 * lanes + c, low, high);
    }
}

// out[kGatherRows][vectors of y] += Σ_pairs weights[pair][r] · y[pair][column…].
template <int kVectorsX, int kVectorsY>
WSCL_INLINE void gather_tile(const Pair2* weights, const Pair2* y, int64_t pairs, int64_t d, float* out) {
  constexpr int kWidth = 16, kTile = kGatherRows<float, kVectorsX>;
  Vector<float> sum[kTile][kVectorsY];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) sum[r][v] = Vector<float>{};
  for (int64_t j = 0; j < pairs; ++j) {
    __m512i value[kVectorsY];
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) value[v] = load_pairs(y + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsY; ++v) sum[r][v] = dot(sum[r][v], weights + r, value[v]);
    weights += kVectorsX * kWidth;
    y += d;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectorsY; ++v) {
      float* at = out + r * d + v * kWidth;
      store(at, load(at) + sum[r][v]);
    }
}

// out[panel][d] += weightsᵀ y, d a multiple of 16, both in pairs of rows of y.
template <int kVectorsX>
__attribute__((noinline)) void gather_panel(const Pair2* weights, const Pair2* y, int64_t pairs, int64_t d,
                                            float* out) {
  constexpr int kWidth = 16, kTile = kGatherRows<float, kVectorsX>;
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth)
    for (int r = 0; r < kVectorsX * kWidth; r += kTile)
      gather_tile<kVectorsX, 2>(weights + r, y + c, pairs, d, out + r * d + c);
  for (; c < d; c += kWidth)
    for (int r = 0; r < kVectorsX * kWidth; r += kTile)
      gather_tile<kVectorsX, 1>(weights + r, y + c, pairs, d, out + r * d + c);
}

// Weights [count][lanes], lanes a multiple of 16, as pairs of neighbouring lanes [count][lanes / 2].
inline void pair_lanes(const float* weights, int64_t count, int64_t lanes, Pair2* out) {
  for (int64_t at = 0; at < count * lanes; at += 16) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)load(weights + at));
    _mm256_storeu_si256((__m256i*)(out + at / 2), halves);
  }
}

// out[kTile][vectors of x's rows] += Σ_pairs weights[k][pair] · x[pair][column…].
template <int kPairsOfLanes, int kTile, int kVectors>
WSCL_INLINE void scatter_tile(const Pair2* weights, const Pair2* x, int64_t d, float* out) {
  constexpr int kWidth = 16;
  Vector<float> sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[k][v] = Vector<float>{};
  for (int64_t r = 0; r < kPairsOfLanes; ++r) {
    __m512i value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load_pairs(x + v * kWidth);
#pragma GCC unroll 16
    for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[k][v] = dot(sum[k][v], weights + k * kPairsOfLanes + r, value[v]);
    x += d;
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTile; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* at = out + k * d + v * kWidth;
      store(at, load(at) + sum[k][v]);
    }
}

// out[count][d] += weights x, d a multiple of 16, both in pairs of the panel's lanes.
template <int kVectorsX>
__attribute__((noinline)) void scatter_panel(const Pair2* weights, const Pair2* x, int64_t count, int64_t d,
                                             float* out) {
  constexpr int kWidth = 16, kPairsOfLanes = kVectorsX * kWidth / 2;
  const auto rows = [&](auto tile, int64_t k, int64_t c, int64_t vectors) {
    constexpr int kTile = decltype(tile)::kValue;
    const Pair2* from = weights + k * kPairsOfLanes;
    float* to = out + k * d + c;
    if (vectors == 3)
      scatter_tile<kPairsOfLanes, kTile, 3>(from, x + c, d, to);
    else if (vectors == 2)
      scatter_tile<kPairsOfLanes, kTile, 2>(from, x + c, d, to);
    else
      scatter_tile<kPairsOfLanes, kTile, 1>(from, x + c, d, to);
  };
  for (int64_t c = 0, vectors; c < d; c += vectors * kWidth) {
    vectors = scatter_vectors((d - c) / kWidth);
    int64_t k = 0;
    for (; k + kKeys <= count; k += kKeys) rows(Number<kKeys>(), k, c, vectors);
    for (; k < count; ++k) rows(Number<1>(), k, c, vectors);
  }
}

// What the processor can do at most, as multiply_add.
inline double bfloat16_dot(int64_t rounds) {
  constexpr int kChains = 12;
  const __m512i pairs = _mm512_set1_epi32(0x3f803f80);
  const Pair2 pair = 0x3c003c00;
  Vector<float> chain[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast(float(c));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      chain[c] = dot(chain[c], &pair, pairs);
      WSCL_KEEP(chain[c]);
    }
  }
  return 4.0 * rounds * kChains * Simd<float>::kWidth;
}

}  // namespace WSCL_ISA
}  // namespace wscl
