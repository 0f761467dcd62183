// The scan of kmeans_passes_cuda.cuh: scores of rows against all columns by tensor cores, and an epilogue that
// sees each tile of them in registers. No score is ever stored.
//
// Tile map. A CTA owns 128 rows, a warp 32 of them; columns come in tiles of 64, d in pieces of 64:
//
//   rows [d / 64][128][64]             shared memory once, where d ≤ 256; else a piece comes with the columns'
//   for each tile of 64 columns:
//     S[32][64] = −f · offset          registers of a warp
//     for each piece of d, a few in flight by cp.async:
//       S += rows piece · columns pieceᵀ
//     epilogue(S)
//
// Memory: rows once, columns once a CTA (from L2: all CTAs stream the same ones), a few numbers a row out.
// One barrier a piece.
#pragma once

#include "kmeans_passes_cuda.cuh"
#include "similarity_launch.cuh"

namespace wscl::cuda {

constexpr float kNoScore = -3e38f;  // of a column past k: below every score, and finite

struct ScanParams {
  KMeansProblem problem;
  KMeansTable table;
  KMeansBlock block;
  int pieces, tiles;
};

template <bool kResident_>
struct ScanTiling : Tiling<Float16, __half, 1, kPiece, 2, 4, kScanColumns, kResident_ ? 4 : 3, false, 3> {
  using Base = Tiling<Float16, __half, 1, kPiece, 2, 4, kScanColumns, kResident_ ? 4 : 3, false, 3>;
  static constexpr bool kResident = kResident_;
  static constexpr int kOffsets = (kResident ? 0 : Base::kRowPlane) + Base::kColumnPlane;  // within a stage
  static constexpr int kStageBytes = kOffsets + kScanColumns * 4;
  static_assert(Base::kRows == kScanRows && kStageBytes % 128 == 0);

  __host__ __device__ static constexpr int row_bytes(int pieces) {
    return kResident ? pieces * Base::kRowPlane : 0;
  }
  __host__ __device__ static constexpr int scan_bytes(int pieces) {
    return row_bytes(pieces) + Base::kStages * kStageBytes;
  }
};

// What a thread's rows are; `position` counts from the CTA's first.
__device__ __forceinline__ int row_position(int row_tile, int half) {
  return threadIdx.x / 32 * 32 + row_tile * 16 + half * 8 + threadIdx.x % 32 / 4;
}

// Element e of n's scores stands in this column of its tile.
__device__ __forceinline__ int column_in_tile(int lane, int n, int e) {
  return n * 8 + lane % 4 * 2 + e;
}

// Pieces of columns, and where they are not resident of rows, on their way to shared memory.
template <class T>
struct ScanStream {
  Rows rows, columns;
  const float* offset;
  uint32_t stages;
  int row0, tile, piece, pieces, last;  // what is asked for next

  __device__ __forceinline__ void ask(int buffer) {
    if (tile < last) {
      const uint32_t stage = stages + buffer * T::kStageBytes;
      const uint32_t to = stage + (T::kResident ? 0 : T::kRowPlane);
      if constexpr (!T::kResident) {
        const int64_t count = rows.count;
        const int first = row0;
        load_tile<T, T::kRows>(stage, from_piece<T>(rows, piece), first, kPiece, true, false,
                               [=](int row) { return first + row < count; });
      }
      const int64_t column0 = int64_t(tile) * T::kColumns;
      load_tile<T, T::kColumns>(to, from_piece<T>(columns, piece), column0, kPiece, true, true,
                                [](int) { return true; });
      if (piece == 0 && threadIdx.x < T::kColumns / 4)
        copy_async(stage + T::kOffsets + threadIdx.x * 16, offset + column0 + threadIdx.x * 4, 16);
      if (++piece == pieces) {
        piece = 0;
        ++tile;
      }
    }
    copy_commit();
  }
};

// s += x · yᵀ over the first eights of columns alone, which is what the last tile has: an instruction takes
// eight.
template <class T>
__device__ __forceinline__ void add_eights(uint32_t x_tile, uint32_t y_tile, int eights, Logits<T>& s) {
  const int lane = threadIdx.x % 32;
  const uint32_t x_address = MmaSync<T>::rows_address(x_tile);
  const uint32_t y_address = lane_address<T>(y_tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  unrolled<MmaSync<T>::kSteps>([&](auto k) {
    RowFragments<T> a;
    MmaSync<T>::template load_rows<k>(x_address, a);
    unrolled<T::kColumns / 16>([&](auto n) {
      if (2 * n >= eights) return;
      uint32_t b[4];
      load_matrices<n * 16 * T::kPitch>(b, y_address ^ (k << 5));
      unrolled<2>([&](auto half) {
        if (2 * n + half >= eights) return;
        unrolled<T::kRowTiles>([&](auto rt) {
          float (&to)[4] = s[rt][2 * n + half];
          T::Mma::multiply_add(to, a[rt][0], b[2 * half], b[2 * half + 1], to);
        });
      });
    });
  });
}

// Scores of 128 rows, from row0 of `rows` on, against tiles [first, last): epilogue(tile, S) sees each. factor
// is that of this thread's rows, 0 for those that do not exist.
template <class T, class Epilogue>
__device__ __forceinline__ void scan_tiles(const ScanParams& p, const Rows& rows, uint32_t memory, int row0,
                                           int first, int last, const float (&factor)[2][2],
                                           Epilogue& epilogue) {
  const Rows columns = {p.table.columns, p.table.depth, nullptr, p.table.columns_padded};
  if constexpr (T::kResident)
    for (int piece = 0; piece < p.pieces; ++piece)
      load_tile<T, T::kRows>(memory + piece * T::kRowPlane, from_piece<T>(rows, piece), row0, kPiece, true,
                             false, [&](int row) { return row0 + row < rows.count; });
  ScanStream<T> stream = {rows,     columns, p.table.offset, memory + T::row_bytes(p.pieces), row0, first, 0,
                          p.pieces, last};
  for (int i = 0; i < T::kStages - 1; ++i) stream.ask(i);

  const MmaSync<T> mma{};
  Logits<T> s;
  int buffer = 0;
  for (int tile = first; tile < last; ++tile) {
    const int64_t left = p.table.k - tile * int64_t(T::kColumns);
    const int eights = left < T::kColumns ? static_cast<int>(left + 7) / 8 : T::kColumns / 8;
    for (int piece = 0; piece < p.pieces; ++piece) {
      copy_wait<T::kStages - 2>();
      __syncthreads();  // everyone's copies of this piece are here, and everyone is done with the one
                        // before
      stream.ask((buffer + T::kStages - 1) % T::kStages);
      const uint32_t stage = stream.stages + buffer * T::kStageBytes;
      if (piece == 0)
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) {
          const float2 offset = load_pair(stage + T::kOffsets + column_in_tile(threadIdx.x % 32, n, 0) * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[i / 2][n][i % 2 * 2] = -factor[i / 2][i % 2] * offset.x;
            s[i / 2][n][i % 2 * 2 + 1] = -factor[i / 2][i % 2] * offset.y;
          }
        }
      const uint32_t x_tile = T::kResident ? memory + piece * T::kRowPlane : stage;
      const uint32_t y_tile = T::kResident ? stage : stage + T::kRowPlane;
      if (eights == T::kColumns / 8)
        mma.template similarities<false>(x_tile, y_tile, s);
      else
        add_eights<T>(x_tile, y_tile, eights, s);
      buffer = (buffer + 1) % T::kStages;
    }
    if (left < T::kColumns)
#pragma unroll
      for (int i = 0; i < T::kColumns / 2; ++i)
        if (column_in_tile(threadIdx.x % 32, i / 2 % 8, i % 2) >= left)
          s[i / 16 % 2][i / 2 % 8][i % 2] = s[i / 16 % 2][i / 2 % 8][i % 2 + 2] = kNoScore;
    epilogue(tile, s);
  }
  copy_wait<0>();
}

template <class T, class Kernel>
cudaError_t launch_scan(Kernel kernel, const ScanParams& p, dim3 grid, int bytes, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error) return error;
  kernel<<<grid, T::kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

// f(a tiling that serves these pieces of d).
template <class F>
auto with_tiling(int pieces, int extra_bytes, const F& f) {
  using Resident = ScanTiling<true>;
  if (pieces <= 4 && fits(Resident::scan_bytes(pieces) + extra_bytes)) return f(Resident());
  return f(ScanTiling<false>());
}

}  // namespace wscl::cuda
