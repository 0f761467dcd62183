// The products of the similarity pass on bfloat16 rows by the dot instruction, which adds two products to each
// lane, accumulated in float: what a step is, and how the operands lie.
//
// A pair is two bfloat16 in 32 bits. Pairs of the first product lie along d: a row of y already is a list of
// pairs, and is read where it is. Pairs of the second lie along y's rows, two of which are interleaved; the
// weights are rounded to bfloat16 for it.
#pragma once

#include "similarity_panels.h"

namespace wscl {
namespace WSCL_ISA {

using Pair2 = uint32_t;

struct Pairs {
  using T = float;
  using Element = BFloat16;
  using Step = Pair2;
  static constexpr int kNumbers = 2;
  using Lanes = __m512i;

  static WSCL_INLINE Lanes lanes(const void* steps) {
    return _mm512_loadu_si512(steps);
  }
  static WSCL_INLINE Lanes spread(const void* step) {
    int32_t pair;
    std::memcpy(&pair, step, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static WSCL_INLINE Vector<float> add(Vector<float> sum, Lanes a, Lanes b) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

// Rows [first, first + count) as [steps][vectors · 16] pairs, zero beyond count and d.
inline void pack_panel(const Rows<BFloat16>& rows, int64_t first, int64_t count, int vectors, int64_t d,
                       int64_t steps, float* row, Pair2* out, float* norms) {
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
        if (p / 2 + e >= steps) break;
        _mm512_storeu_si512(out + ((p / 2 + e) * vectors + v) * kWidth, (__m512i)square[e]);
      }
    }
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
      const __mmask16 live = d - c >= kWidth ? 0xffff : (1u << larger(d - c, 0)) - 1;
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

// Weights [count][lanes], lanes a multiple of 16, as pairs of neighbouring lanes [count][lanes / 2].
inline void pair_lanes(const float* weights, int64_t count, int64_t lanes, Pair2* out) {
  for (int64_t at = 0; at < count * lanes; at += 16) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)load(weights + at));
    _mm256_storeu_si256((__m256i*)(out + at / 2), halves);
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
      chain[c] = Pairs::add(chain[c], Pairs::spread(&pair), pairs);
      WSCL_KEEP(chain[c]);
    }
  }
  return 4.0 * rounds * kChains * Simd<float>::kWidth;
}

}  // namespace WSCL_ISA
}  // namespace wscl
