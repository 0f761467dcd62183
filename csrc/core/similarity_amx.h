// The products of the similarity pass on bfloat16 rows by tiles of AMX, accumulated in float.
//
// As for the dot instruction (similarity_dot.h) pairs of the first product lie along d, of the second along y's
// rows, of the third along x's. Sizes are whole tiles: d is padded to 32, a panel of x has 16 or 32 lanes, y's
// rows are read 16 at a time.
//
//   S[16 y][16 x]  += y[16][16 pairs]         · x_packed[16 pairs][16]
//   Oᵀ[16 d][16 x] += yᵀ[16][16 pairs]        · weights[16 pairs][16 x]
//   C[16 y][16 d]  += weights[16 y][16 pairs] · x_pairs[16 pairs][16 d]
//
// What rows gather is kept transposed, panel by panel: y is transposed once a block, weights never.
#pragma once

#include "amx.h"
#include "similarity_dot.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kTileBytes = 64;  // of a tile's row

// Two tiles of sums by two of them: the second row or column is left out where there is none.
template <bool kTwoRows, bool kTwoColumns>
struct Square {
  static WSCL_INLINE void zero() {
    tile_zero<0>();
    if (kTwoColumns) tile_zero<1>();
    if (kTwoRows) tile_zero<2>();
    if (kTwoRows && kTwoColumns) tile_zero<3>();
  }
  static WSCL_INLINE void load(const float* sums, int64_t stride) {
    const int64_t bytes = stride * int64_t(sizeof(float));
    const float* const below = sums + kTileRows * stride;
    tile_load<0>(sums, bytes);
    if (kTwoColumns) tile_load<1>(sums + kTileRows, bytes);
    if (kTwoRows) tile_load<2>(below, bytes);
    if (kTwoRows && kTwoColumns) tile_load<3>(below + kTileRows, bytes);
  }
  static WSCL_INLINE void store(float* sums, int64_t stride) {
    const int64_t bytes = stride * int64_t(sizeof(float));
    float* const below = sums + kTileRows * stride;
    tile_store<0>(sums, bytes);
    if (kTwoColumns) tile_store<1>(sums + kTileRows, bytes);
    if (kTwoRows) tile_store<2>(below, bytes);
    if (kTwoRows && kTwoColumns) tile_store<3>(below + kTileRows, bytes);
  }
  // `left`: rows of pairs, the second tile's `below` bytes on; `right`: pairs, the second tile's kTilePairs on.
  static WSCL_INLINE void multiply(const void* left, int64_t left_stride, int64_t below, const Pair2* right,
                                   int64_t right_stride) {
    const int64_t bytes = right_stride * int64_t(sizeof(Pair2));
    tile_load<4>(left, left_stride);
    tile_load<6>(right, bytes);
    tile_multiply<0, 4, 6>();
    if (kTwoRows) {
      tile_load<5>(static_cast<const char*>(left) + below, left_stride);
      tile_multiply<2, 5, 6>();
    }
    if (kTwoColumns) {
      tile_load<7>(right + kTilePairs, bytes);
      tile_multiply<1, 4, 7>();
      if (kTwoRows) tile_multiply<3, 5, 7>();
    }
  }
};

// out[32 or 16][lanes] = the first product of so many rows of y, `stride` bytes apart, with a panel. `then` is
// called after every step: what it does goes on beside the tiles' products.
template <int kVectorsX, bool kTwoRows, class Then>
WSCL_INLINE void logits_by_tiles(const char* y, int64_t stride, const Pair2* x, int64_t depth, float* out,
                                 const Then& then) {
  constexpr int64_t kLanes = kVectorsX * kTileRows;
  using Sums = Square<kTwoRows, kVectorsX == 2>;
  Sums::zero();
  for (int64_t p = 0; p < depth; p += kTilePairs) {
    Sums::multiply(y + p * int64_t(sizeof(Pair2)), stride, kTileRows * stride, x + p * kLanes, kLanes);
    then();
  }
  Sums::store(out, kLanes);
}

// Rows of y two by two, transposed: [padded d][stride] pairs along the rows, zero beyond count and d.
inline void transpose_rows(const BFloat16* const* y, int64_t count, int64_t d, int64_t padded, int64_t stride,
                           Pair2* out) {
  for (int64_t k0 = 0; k0 < count; k0 += 2 * kTilePairs)
    for (int64_t c = 0; c < padded; c += kTileRows) {
      const __mmask16 live = d - c >= kTileRows ? 0xffff : (1u << larger(d - c, 0)) - 1;
      Vector<float> square[kTilePairs];
#pragma GCC unroll 16
      for (int64_t p = 0; p < kTilePairs; ++p) {
        const int64_t k = k0 + 2 * p;
        Simd<float>::Words low = {}, high = {};
        if (k < count) low = in_words(_mm256_maskz_loadu_epi16(live, y[k] + c));
        if (k + 1 < count) high = in_words(_mm256_maskz_loadu_epi16(live, y[k + 1] + c));
        square[p] = (Vector<float>)(low | high << 16);
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileRows; ++i) {
        Pair2* const to = out + (c + i) * stride + k0 / 2;
        _mm512_storeu_si512(to, (__m512i)square[i]);
      }
    }
  // A tile that begins anywhere in the block ends here.
  for (int64_t c = 0; c < padded; ++c)
    _mm512_storeu_si512(out + c * stride + round_up(count, 2 * kTilePairs) / 2, _mm512_setzero_si512());
}

// A panel's weights as the other two products read them.
template <int kVectorsX>
struct PairedWeights {
  static constexpr int64_t kLanes = kVectorsX * kTileRows;
  Pair2* pairs;  // [whole tiles of columns' pairs][lanes]
  Pair2* rows;   // [whole tiles of columns][kTilePairs], pairs of neighbouring lanes

  // Columns k, which is even, and k + 1.
  WSCL_INLINE void store_pairs(int64_t k, const Vector<float>* even, const Vector<float>* odd) const {
    // Of numbers 0 … 15 and 16 … 31: pairs of the first of both, the second of both, …
    alignas(64) static const uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kOrder);
    for (int v = 0; v < kVectorsX; ++v) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd[v], (__m512)even[v]);
      _mm512_storeu_si512(pairs + k / 2 * kLanes + v * kTileRows,
                          _mm512_permutexvar_epi16(order, (__m512i)both));
    }
  }
  WSCL_INLINE void store_rows(int64_t k, const Vector<float>* weight) const {
    const Vector<float> high = kVectorsX == 2 ? weight[kVectorsX - 1] : Vector<float>{};
    _mm512_storeu_si512(rows + k * kTilePairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)weight[0]));
  }
  // Zero beyond `count` columns.
  void finish(int64_t count) const {
    const auto clear = [](Pair2* from, const Pair2* end) {
      for (; from < end; from += kTilePairs) _mm512_storeu_si512(from, _mm512_setzero_si512());
    };
    if (pairs) clear(pairs + (count + 1) / 2 * kLanes, pairs + round_up(count, 2 * kTilePairs) / 2 * kLanes);
    if (rows) clear(rows + count * kTilePairs, rows + round_up(count, kTileRows) * kTilePairs);
  }
};

// out[d][lanes] += yᵀ weights: y as transpose_rows leaves it, `weights` as PairedWeights' pairs.
template <int kVectorsX>
__attribute__((noinline)) void gather_by_tiles(const Pair2* weights, const Pair2* y, int64_t stride,
                                               int64_t count, int64_t d, float* out) {
  using Sums = Square<true, kVectorsX == 2>;
  constexpr int64_t kLanes = kVectorsX * kTileRows;
  const int64_t bytes = stride * int64_t(sizeof(Pair2));
  for (int64_t c = 0; c < d; c += 2 * kTileRows) {
    Sums::load(out + c * kLanes, kLanes);
    for (int64_t p = 0; 2 * p < count; p += kTilePairs)
      Sums::multiply(y + c * stride + p, bytes, kTileRows * bytes, weights + p * kLanes, kLanes);
    Sums::store(out + c * kLanes, kLanes);
  }
}

// out[count, whole tiles of it][d] += weights x: `weights` as PairedWeights' rows, x's rows as pairs.
__attribute__((noinline)) inline void scatter_by_tiles(const Pair2* weights, const Pair2* x, int64_t count,
                                                       int64_t d, float* out, Aheads& ahead) {
  const auto rows = [&](auto sums, int64_t k, int64_t c) {
    ahead.fetch();
    float* const to = out + k * d + c;
    sums.load(to, d);
    sums.multiply(weights + k * kTilePairs, kTileBytes, kTileRows * kTileBytes, x + c, d);
    sums.store(to, d);
  };
  for (int64_t c = 0; c < d; c += 2 * kTileRows) {
    int64_t k = 0;
    for (; k + kTileRows < count; k += 2 * kTileRows) rows(Square<true, true>(), k, c);
    if (k < count) rows(Square<false, true>(), k, c);
  }
}

}  // namespace WSCL_ISA
}  // namespace wscl
