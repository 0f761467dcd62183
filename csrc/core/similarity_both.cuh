// The epilogue of kBoth: sums of 2^logits over a row's columns and over a column's rows.
//
// No shift: logits are known to be small, so one exponential serves the row and the column. A row's sum stays
// in registers. A column's is added up over the warp's rows by halving exchanges, 14 shuffles for 64 columns,
// then over the warps through shared memory, and leaves one number for each column and block of rows.
#pragma once

#include "similarity_epilogue.cuh"

namespace wscl::cuda {

// Which of a CTA's rows take part. A word is read once for all of its rows.
template <class T>
struct RowsTakingPart {
  static_assert(T::kRows == kValidBits || T::kRows == 2 * kValidBits);
  uint64_t first, second;

  __device__ __forceinline__ RowsTakingPart(const SimilarityParams& p, int row0)
      : first(word(p, row0)), second(T::kRows > kValidBits ? word(p, row0 + kValidBits) : 0) {}

  static __device__ __forceinline__ uint64_t word(const SimilarityParams& p, int row) {
    const int64_t count = p.x.count - row;
    if (count <= 0) return 0;
    const uint64_t existing = count >= kValidBits ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    return p.x_valid ? p.x_valid[row / kValidBits] & existing : existing;
  }
  __device__ __forceinline__ bool operator()(int row) const {
    return ((row < kValidBits ? first : second) >> (row % kValidBits)) & 1;
  }
};

template <class T>
struct BothSums {
  static constexpr int kValues = T::kColumns / 4;  // columns of a lane
  static constexpr int kLeft = kValues / 8;        // after the exchange

  const SimilarityParams& p;
  uint32_t memory;                  // [2][kWarps][kColumns]
  float bias[T::kRowTiles][2];      // 0, or −∞ for a row that takes no part
  float sum[T::kRowTiles][2] = {};  // of this lane's columns
  int pending = -1;                 // the tile whose column sums lie in shared memory

  __device__ __forceinline__ BothSums(const SimilarityParams& p, const WarpRows<T>& rows,
                                      const RowsTakingPart<T>& take_part, uint32_t memory)
      : p(p), memory(memory) {
    const int row0 = block_row<T>(p);
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) bias[rt][h] = take_part(rows.row(rt, h) - row0) ? 0.f : -INFINITY;
  }

  __device__ __forceinline__ uint32_t sums_of(int tile, int warp) const {
    return memory + (tile % 2 * T::kWarps + warp) * T::kColumns * 4;
  }

  // Logits of a tile to sums.
  __device__ __forceinline__ void add(const Logits<T>& s, float scale, int tile, bool with_columns) {
    float column[kValues];
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even, odd;
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) {
          const float a = exp2_approx(fmaf(s[rt][n][2 * h], scale, bias[rt][h]));
          const float b = exp2_approx(fmaf(s[rt][n][2 * h + 1], scale, bias[rt][h]));
          even = n ? even + a : a;
          odd = n ? odd + b : b;
          column[2 * n] = rt || h ? column[2 * n] + a : a;
          column[2 * n + 1] = rt || h ? column[2 * n + 1] + b : b;
        }
        sum[rt][h] += even + odd;
      }
    if (!with_columns) return;
    const int lane = threadIdx.x % 32;
    int mine = 0;  // of the lane's kValues columns the first that it keeps
#pragma unroll
    for (int lanes = 16, kept = kValues / 2; lanes >= 4; lanes /= 2, kept /= 2) {
      const bool upper = lane & lanes;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i >= kept) break;
        const float given = upper ? column[i] : column[i + kept];
        column[i] = (upper ? column[i + kept] : column[i]) + __shfl_xor_sync(kAllLanes, given, lanes);
      }
      mine += upper ? kept : 0;
    }
    store(tile, mine, column[0], column[kLeft - 1]);
  }

  // Of a warp that has no row.
  __device__ __forceinline__ void add_nothing(int tile) const {
    const int group = threadIdx.x % 32 / 4;
    store(tile, group * kLeft, 0, 0);
  }

  __device__ __forceinline__ void store(int tile, int mine, float first, float second) const {
    const uint32_t to = sums_of(tile, threadIdx.x / 32) + (mine / 2 * 8 + threadIdx.x % 4 * 2 + mine % 2) * 4;
    if constexpr (kLeft == 2)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
    else
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(first) : "memory");
  }

  // Writes the pending tile's column sums. All warps' parts are there: a barrier lies between.
  __device__ __forceinline__ void flush(const TileRange& range) {
    if (pending < 0) return;
    const int64_t column = int64_t(range.place(pending)) * T::kColumns + threadIdx.x;
    if (threadIdx.x < T::kColumns && column < p.y.count) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < T::kWarps; ++warp) {
        float part;
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(part)
                     : "r"(sums_of(pending, warp) + threadIdx.x * 4)
                     : "memory");
        total += part;
      }
      p.column_sum[blockIdx.x * p.column_stride + column] = total;
    }
    pending = -1;
  }

  __device__ __forceinline__ void finish(const WarpRows<T>& rows, const TileRange& range, int split) {
    __syncthreads();  // the last tile's column sums are there
    flush(range);
#pragma unroll
    for (int rt = 0; rt < T::kRowTiles; ++rt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float total = sum_of_row(sum[rt][h]);
        const int r = rows.row(rt, h);
        if (threadIdx.x % 4 == 0 && r < p.x.count) p.sum[part_place(p, split, r)] = total;
      }
  }
};

}  // namespace wscl::cuda
