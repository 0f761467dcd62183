// The main loop's policy: how a warp multiplies. Everything that knows of fragments' instructions is here; the
// epilogues see numbers and where they stand, the kernels see tiles.
//
//   take_rows()      the warp's rows, once they lie in shared memory
//   similarities()   S = X · Yᵀ of a tile, handed to an epilogue as Logits
//   gather()         O += W · Y of the same tile, W in the registers that held S
//
// Logits' element [rt][n][2 h + e] of a lane is the pair of row 16 rt + 8 h + lane / 4 of the warp's and column
// 8 n + 2 (lane % 4) + e of the tile; Output's is the number of that row at column 8 n + 2 (lane % 4) + e of d.
#pragma once

#include "similarity_tile.cuh"

namespace wscl::cuda {

template <class T>
using Logits = float[T::kRowTiles][T::kColumns / 8][4];
template <class T>
using Output = float[T::kRowTiles][T::kDim / 8][4];
template <class T>
using RowFragments = uint32_t[T::kRowTiles][T::kTerms][4];
template <class T>
using ColumnFragments = uint32_t[T::kTerms][4];  // of 16 columns

// Keeps the compiler from holding every k's address in a register throughout.
__device__ __forceinline__ uint32_t hide(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
// The address of chunk `chunk` (0 or 1) of a row. That of chunk 2 k + `chunk` is this ^ (k << 5): tiles are
// aligned to their pitch, so the exclusive or of the swizzle and that of k are one.
template <class T>
__device__ __forceinline__ uint32_t lane_address(uint32_t tile, int row, int chunk) {
  return hide(tile + chunk_offset<T::kPitch>(row, chunk));
}

template <class T>
__device__ __forceinline__ void clear(Logits<T>& s) {
#pragma unroll
  for (int i = 0; i < T::kRowTiles * T::kColumns / 2; ++i) (&s[0][0][0])[i] = 0;
}

// By mma.sync, with fragments from ldmatrix.
template <class T>
struct MmaSync {
  static constexpr int kSteps = T::kDim / 16;
  static constexpr int kKept = T::kKeptSteps;
  RowFragments<T> kept[kKept ? kKept : 1];

  static __device__ __forceinline__ uint32_t rows_address(uint32_t x_tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return lane_address<T>(x_tile, warp * T::kRowTiles * 16 + lane % 16, lane / 16);
  }
  // The rows' fragments at step k of the first product.
  template <int k>
  static __device__ __forceinline__ void load_rows(uint32_t address, RowFragments<T>& a) {
    unrolled<T::kRowTiles>([&](auto rt) {
      unrolled<T::kTerms>([&](auto term) {
        load_matrices<term * T::kRowPlane + rt * 16 * T::kPitch>(a[rt][term], address ^ (k << 5));
      });
    });
  }

  __device__ __forceinline__ void take_rows(uint32_t x_tile) {
    unrolled<kKept>([&](auto k) { load_rows<k>(rows_address(x_tile), kept[k]); });
  }

  // s = x · yᵀ, or s += x · yᵀ
  template <bool kAnew>
  __device__ __forceinline__ void similarities(uint32_t x_tile, uint32_t y_tile, Logits<T>& s) const {
    if constexpr (T::kSplit) return similarities_split<kAnew>(x_tile, y_tile, s);
    multiply(x_tile, y_tile, [&](auto k, auto n, const RowFragments<T>& a, const ColumnFragments<T>& b) {
#pragma unroll
      for (int rt = 0; rt < T::kRowTiles; ++rt)
        multiply_add<T, kAnew && k == 0>(s[rt][2 * n], s[rt][2 * n + 1], a[rt][0], b[0]);
    });
  }

  // What a tensor core cuts off (gather_split) is of the size of what it has added up. So the small products
  // have a sum of their own, and the large ones are few. The product of x and y then is that of y and x, too.
  template <bool kAnew>
  __device__ __forceinline__ void similarities_split(uint32_t x_tile, uint32_t y_tile, Logits<T>& s) const {
    static_assert(T::kRowTiles == 1);
    Logits<T> large, small;
    multiply(x_tile, y_tile, [&](auto k, auto n, const RowFragments<T>& a, const ColumnFragments<T>& b) {
      multiply_add_rest<T, k == 0>(small[0][2 * n], small[0][2 * n + 1], a[0], b);
      multiply_add<T, k == 0>(large[0][2 * n], large[0][2 * n + 1], a[0][0], b[0]);
    });
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; ++i) {
      const float sum = (&large[0][0][0])[i] + (&small[0][0][0])[i];
      (&s[0][0][0])[i] = kAnew ? sum : (&s[0][0][0])[i] + sum;
    }
  }

  // Calls product(k, n, a, b) for every step k of d and every 16 columns n, with their fragments.
  template <class Product>
  __device__ __forceinline__ void multiply(uint32_t x_tile, uint32_t y_tile, const Product& product) const {
    const int lane = threadIdx.x % 32;
    const uint32_t x_address = kKept == kSteps ? 0 : rows_address(x_tile);
    const uint32_t y_address = lane_address<T>(y_tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
    unrolled<kSteps>([&](auto k) {
      RowFragments<T> a;
      if constexpr (k < kKept) {
#pragma unroll
        for (int i = 0; i < T::kRowTiles * T::kTerms * 4; ++i) (&a[0][0][0])[i] = (&kept[k][0][0][0])[i];
      } else {
        load_rows<k>(x_address, a);
      }
      unrolled<T::kColumns / 16>([&](auto n) {
        ColumnFragments<T> b;
        unrolled<T::kTerms>([&](auto term) {
          load_matrices<term * T::kColumnPlane + n * 16 * T::kPitch>(b[term], y_address ^ (k << 5));
        });
        product(k, n, a, b);
      });
    });
  }

  // o += w · y
  static __device__ __forceinline__ void gather(const Logits<T>& w, uint32_t y_tile, Output<T>& o) {
    if constexpr (T::kSplit) return gather_split(w, y_tile, o);
    const int lane = threadIdx.x % 32;
    const uint32_t y_address = lane_address<T>(y_tile, lane % 16, lane / 16);
    unrolled<T::kColumns / 16>([&](auto k) {
      RowFragments<T> a;
#pragma unroll
      for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          pack_terms<T>(w[rt][2 * k + i / 2][i % 2 * 2], w[rt][2 * k + i / 2][i % 2 * 2 + 1], &a[rt][0][i], 4);
      unrolled<T::kDim / 16>([&](auto n) {
        uint32_t b[T::kTerms][4];
        unrolled<T::kTerms>([&](auto term) {
          load_matrices_transposed<term * T::kColumnPlane + k * 16 * T::kPitch>(b[term], y_address ^ (n << 5));
        });
#pragma unroll
        for (int rt = 0; rt < T::kRowTiles; ++rt)
          multiply_add_terms<T>(o[rt][2 * n], o[rt][2 * n + 1], a[rt], b);
      });
    });
  }

  // A tensor core cuts off what an addition rounds, always toward zero: over many columns its sums fall short,
  // on an H200 by up to twice what float32 allows at 300 columns. So it adds up one tile's products, and the
  // tiles' sums are added to the output. One step after the other: ptxas else reads fragments ahead until it
  // spills.
  static __device__ __forceinline__ void gather_split(const Logits<T>& w, uint32_t y_tile, Output<T>& o) {
    constexpr int kColumnSteps = T::kColumns / 16, kTogether = 4;
    static_assert(T::kRowTiles == 1 && T::kDim / 16 % kTogether == 0);
    const int lane = threadIdx.x % 32;
    const uint32_t y_address = lane_address<T>(y_tile, lane % 16, lane / 16);
    uint32_t a[kColumnSteps][T::kTerms][4];
#pragma unroll
    for (int k = 0; k < kColumnSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pack_terms<T>(w[0][2 * k + i / 2][i % 2 * 2], w[0][2 * k + i / 2][i % 2 * 2 + 1], &a[k][0][i], 4);
    unrolled<T::kDim / 16 / kTogether>([&](auto group) {
      float sums[2 * kTogether][4];
      unrolled<kColumnSteps>([&](auto k) {
        unrolled<kTogether>([&](auto i) {
          constexpr int n = group * kTogether + i;
          uint32_t b[T::kTerms][4];
          unrolled<T::kTerms>([&](auto term) {
            load_matrices_transposed<term * T::kColumnPlane + k * 16 * T::kPitch>(b[term],
                                                                                  y_address ^ (n << 5));
          });
          multiply_add_terms<T, k == 0>(sums[2 * i], sums[2 * i + 1], a[k], b);
          __syncwarp();
        });
      });
#pragma unroll
      for (int i = 0; i < 8 * kTogether; ++i) (&o[0][2 * kTogether * group][0])[i] += (&sums[0][0])[i];
    });
  }
};

}  // namespace wscl::cuda
