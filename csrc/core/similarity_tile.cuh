// Tiles in shared memory: how big they are, where an element lies, how they get there.
//
// A tile is rows × kDim numbers of 2 bytes, kDim a multiple of 64, in 16-byte chunks of eight; chunk c of row r
// lies at chunk c ^ (r % 8) of its row. The eight rows that one ldmatrix phase reads at the same chunk then lie
// in all 32 banks, and so do the eight chunks of a row that are written together.
//
// float32 comes as kTerms tiles ("planes") of bfloat16: x = x0 + x1 (+ x2), each the rounding of what is left.
#pragma once

#include <algorithm>
#include <climits>

#include "mma.cuh"
#include "similarity_cuda.h"

namespace wscl::cuda {

template <class Mma_, class In_, int kTerms_, int kDim_, int kRowTiles_, int kWarps_, int kColumns_,
          int kStages_, int kKeptSteps_, int kBlocks_>
struct Tiling {
  using Mma = Mma_;
  using In = In_;
  static constexpr int kTerms = kTerms_;        // planes
  static constexpr int kDim = kDim_;            // d rounded up
  static constexpr int kRowTiles = kRowTiles_;  // tiles of 16 rows a warp
  static constexpr int kWarps = kWarps_;
  static constexpr int kColumns = kColumns_;  // of a tile: 32, 48 or 64
  static constexpr int kStages = kStages_;    // tiles of columns in flight or in use
  // Rows' fragments that stay in registers: so many steps of 16 of d; the others are read for every tile.
  static constexpr int kKeptSteps = kKeptSteps_;
  static constexpr int kBlocks = kBlocks_;  // CTAs of a multiprocessor that registers should allow

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr bool kSplit = kTerms > 1;
  static constexpr int kPitch = kDim * 2;  // bytes
  static constexpr int kRowPlane = kRows * kPitch;
  static constexpr int kColumnPlane = kColumns * kPitch;
  static constexpr int kRowBytes = kTerms * kRowPlane;
  static constexpr int kColumnBytes = kTerms * kColumnPlane;  // of a stage
  static constexpr int kBuffers = kSplit ? 1 : kStages;
  static constexpr int kStagingBytes = kSplit ? kColumns * kDim * 4 : 0;
  static constexpr int kVectorBytes = 2 * kColumns * 4;  // shifts and weights of columns
  static constexpr int kStaging = kRowBytes + kBuffers * (kColumnBytes + kVectorBytes);  // its offset
  static constexpr int kBounds = kStaging + kStagingBytes;                               // of warps
  static constexpr int kRowVectors = kBounds + kWarps * 16;                  // shift and weight of each row
  static constexpr int kColumnSums = 2 * kWarps * kColumns * 4;              // a tile's, of each warp, twice
  static constexpr int kRowSums = kRows * 8 + 2 * kRowTiles * kThreads * 8;  // vectors, each lane's sums
  static constexpr int kRowVectorBytes = std::max(kRowSums, kColumnSums);
  static constexpr int kSharedBytes = kRowVectors + kRowVectorBytes;

  static_assert(kDim % 64 == 0 && (kColumns == 32 || kColumns == 48 || kColumns == 64));
  static_assert(!kSplit || !kKeptSteps);
};

template <int kPitch>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kPitch + ((chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ const char* row_pointer(const Rows& rows, int64_t position, int size) {
  const int64_t row = rows.index ? rows.index[position] : position;
  return static_cast<const char*>(rows.data) + row * rows.stride * size;
}

// Whether rows can be copied in chunks of 16 bytes; uniform over the grid.
__device__ __forceinline__ bool in_chunks(const Rows& rows, int size) {
  return ((reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(rows.stride * size)) & 15) == 0;
}

// 16 bytes of a row, of which `left` exist and the rest become zero, number by number.
template <class In>
__device__ __forceinline__ void copy_numbers(uint32_t to, const char* from, int left) {
  if constexpr (sizeof(In) == 4) {
    for (int i = 0; i < 4; ++i)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 4 * i),
                   "r"(4 * i < left ? reinterpret_cast<const uint32_t*>(from)[i] : 0)
                   : "memory");
  } else {
    for (int i = 0; i < 8; ++i)
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + 2 * i),
                   "h"(2 * i < left ? reinterpret_cast<const uint16_t*>(from)[i] : uint16_t(0))
                   : "memory");
  }
}

// kCopies chunks of 16 bytes of this thread's, one every kStep rows from row `row0` of the tile on, to `to` and
// every kBytes bytes on: asynchronously where alignment allows. `live(row)` says which rows exist, the others
// and what lies past d become zero; `whole`: all exist, and d is the tile's.
template <class In, int kCopies, int kStep, int kBytes, class Live>
__device__ __forceinline__ void copy_chunks(const Rows& rows, int64_t first, int row0, int chunk, int d,
                                            bool chunks, bool whole, uint32_t to, const Live& live) {
  constexpr int kSize = sizeof(In);
  const int present = max(0, min(16, d * kSize - chunk * 16));
  const char* nothing = static_cast<const char*>(rows.data);
  if (chunks && !rows.index) {
    const char* from = nothing + (first + row0) * rows.stride * kSize + chunk * 16;
    const int64_t step = kStep * rows.stride * kSize;
    if (whole) {
      unrolled<kCopies>([&](auto i) {
        copy_whole_async<i * kBytes>(to, from);
        from += step;
      });
      return;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int left = live(row0 + i * kStep) ? present : 0;
      copy_async(to + i * kBytes, left > 0 ? from : nothing, left);
      from += step;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kCopies; ++i) {
    const int row = row0 + i * kStep, left = live(row) ? present : 0;
    const char* from = left > 0 ? row_pointer(rows, first + row, kSize) + chunk * 16 : nothing;
    if (chunks)
      copy_async(to + i * kBytes, from, left);
    else
      copy_numbers<In>(to + i * kBytes, from, left);
  }
}

// Tile of 2-byte numbers.
template <class T, int kTileRows, class Live>
__device__ __forceinline__ void load_tile(uint32_t tile, const Rows& rows, int64_t first, int d, bool chunks,
                                          bool whole, const Live& live) {
  constexpr int kChunks = T::kDim / 8, kStep = T::kThreads / kChunks;
  static_assert(T::kThreads % kChunks == 0 && kTileRows % kStep == 0 && kStep % 8 == 0);
  const int chunk = threadIdx.x % kChunks, row0 = threadIdx.x / kChunks;
  const uint32_t to = tile + chunk_offset<T::kPitch>(row0, chunk);  // steps of 8 rows keep the swizzle
  copy_chunks<typename T::In, kTileRows / kStep, kStep, kStep * T::kPitch>(rows, first, row0, chunk, d, chunks,
                                                                           whole && d >= T::kDim, to, live);
}

// float32 passes through a staging area in which every thread reads back only what it wrote itself, so that
// its own wait is all the order that is needed.
template <class T, int kTileRows>
struct Staging {
  static constexpr int kChunks = T::kDim / 4, kStep = T::kThreads / kChunks;
  static constexpr int kCopies = kTileRows / kStep;
  static_assert(T::kThreads % kChunks == 0 && kTileRows % kStep == 0);

  template <class Live>
  static __device__ __forceinline__ void fill(uint32_t staging, const Rows& rows, int64_t first, int d,
                                              bool chunks, bool whole, const Live& live) {
    const int chunk = threadIdx.x % kChunks, row0 = threadIdx.x / kChunks;
    copy_chunks<float, kCopies, kStep, T::kThreads * 16>(
        rows, first, row0, chunk, d, chunks, whole && d >= T::kDim, staging + threadIdx.x * 16, live);
  }

  // kPlane: bytes from a tile's first term to its second.
  template <int kPlane>
  static __device__ __forceinline__ void split(uint32_t staging, uint32_t tile) {
    const int chunk = threadIdx.x % kChunks, row0 = threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      float x[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                   : "r"(staging + (i * T::kThreads + threadIdx.x) * 16)
                   : "memory");
      const uint32_t to = tile + chunk_offset<T::kPitch>(row0 + i * kStep, chunk / 2) + chunk % 2 * 8;
#pragma unroll
      for (int term = 0; term < T::kTerms; ++term) {
        const uint32_t low = BFloat16::pack(x[0], x[1]), high = BFloat16::pack(x[2], x[3]);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + term * kPlane), "r"(low), "r"(high)
                     : "memory");
        x[0] -= BFloat16::low(low);
        x[1] -= BFloat16::high(low);
        x[2] -= BFloat16::low(high);
        x[3] -= BFloat16::high(high);
      }
    }
  }
};

// Weights of two neighbouring columns, as kTerms packed pairs.
template <class T>
__device__ __forceinline__ void pack_terms(float x0, float x1, uint32_t* to, int stride) {
  if constexpr (!T::kSplit) {
    *to = T::Mma::pack(x0, x1);
  } else {
#pragma unroll
    for (int term = 0; term < T::kTerms; ++term) {
      const uint32_t packed = BFloat16::pack(x0, x1);
      to[term * stride] = packed;
      x0 -= BFloat16::low(packed);
      x1 -= BFloat16::high(packed);
    }
  }
}

// c0 += a · b[0, 1] and c1 += a · b[2, 3] of one term each; kAnew: = in the place of +=.
template <class T, bool kAnew>
__device__ __forceinline__ void multiply_add(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[4]) {
  using Numbers = const float (&)[4];
  const float nothing[4] = {};
  T::Mma::multiply_add(c0, a, b[0], b[1], kAnew ? nothing : static_cast<Numbers>(c0));
  T::Mma::multiply_add(c1, a, b[2], b[3], kAnew ? nothing : static_cast<Numbers>(c1));
}

// The pairs of terms that count beside the first of both, the smallest products first.
template <class T, bool kAnew>
__device__ __forceinline__ void multiply_add_rest(float (&c0)[4], float (&c1)[4],
                                                  const uint32_t (&a)[T::kTerms][4],
                                                  const uint32_t (&b)[T::kTerms][4]) {
  unrolled<T::kTerms>([&](auto i) {
    constexpr int p = T::kTerms - 1 - i;
    unrolled<i + (p > 0)>([&](auto j) {
      constexpr int q = i - j;
      multiply_add<T, kAnew && i == 0 && j == 0>(c0, c1, a[p], b[q]);
    });
  });
}

// All pairs of terms that count.
template <class T, bool kAnew = false>
__device__ __forceinline__ void multiply_add_terms(float (&c0)[4], float (&c1)[4],
                                                   const uint32_t (&a)[T::kTerms][4],
                                                   const uint32_t (&b)[T::kTerms][4]) {
  if constexpr (T::kSplit) multiply_add_rest<T, kAnew>(c0, c1, a, b);
  multiply_add<T, kAnew && !T::kSplit>(c0, c1, a[0], b[0]);
}

}  // namespace wscl::cuda
