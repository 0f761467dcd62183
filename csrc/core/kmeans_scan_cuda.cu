// The first scan: every lane of a row keeps the best score of its columns, where it was, and the second best.
#include "kmeans_scan_cuda.cuh"

namespace wscl::cuda {
namespace {

// A lane sees 16 columns of a tile: the last four bits of a score say which, so that a maximum carries its
// place along. Four operations a score beside the product.
constexpr uint32_t kPlace = 15;

struct BestTwo {
  float best[2][2], second[2][2];
  int tile_of[2][2];

  __device__ __forceinline__ BestTwo() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      best[i / 2][i % 2] = second[i / 2][i % 2] = -INFINITY;
      tile_of[i / 2][i % 2] = 0;
    }
  }

  template <class S>
  __device__ __forceinline__ void operator()(int tile, const S& s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = best[i / 2][i % 2], next = second[i / 2][i % 2];
      const float before = top;
#pragma unroll
      for (int place = 0; place <= int(kPlace); ++place) {
        const uint32_t bits = __float_as_uint(s[i / 2][place / 2][i % 2 * 2 + place % 2]);
        const float score = __uint_as_float((bits & ~kPlace) | place);
        next = fmaxf(next, fminf(score, top));
        top = fmaxf(top, score);
      }
      if (top != before) tile_of[i / 2][i % 2] = tile;
      best[i / 2][i % 2] = top;
      second[i / 2][i % 2] = next;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) scan_kernel(const ScanParams p) {
  extern __shared__ __align__(512) char shared[];
  const KMeansBlock& b = p.block;
  const int row0 = blockIdx.x * T::kRows, split = blockIdx.y;
  const Rows rows = {b.rows, p.table.depth, nullptr, b.count};
  float factor[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + row_position(i / 2, i % 2);
    factor[i / 2][i % 2] = row < b.count ? b.factor[row] : 0;
  }
  BestTwo found;
  scan_tiles<T>(p, rows, shared_address(shared), row0, static_cast<int>(int64_t(p.tiles) * split / b.splits),
                static_cast<int>(int64_t(p.tiles) * (split + 1) / b.splits), factor, found);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + row_position(i / 2, i % 2), lane = threadIdx.x % 32;
    if (row >= b.count) continue;
    const int64_t to = (int64_t(split) * b.count + row) * kLanes + lane % kLanes;
    const float best = found.best[i / 2][i % 2];
    const int place = static_cast<int>(__float_as_uint(best) & kPlace);
    b.best[to] = best;
    b.second[to] = found.second[i / 2][i % 2];
    b.column[to] = found.tile_of[i / 2][i % 2] * T::kColumns + column_in_tile(lane, place / 2, place % 2);
  }
}

}  // namespace

cudaError_t scan(const KMeansTable& table, const KMeansBlock& block, cudaStream_t stream) {
  const ScanParams p = {{},
                        table,
                        block,
                        static_cast<int>(table.depth / kPiece),
                        static_cast<int>(table.columns_padded / kScanColumns)};
  return with_tiling(p.pieces, 0, [&](auto tiling) {
    using T = decltype(tiling);
    const dim3 grid(blocks_for(block.count, T::kRows), block.splits);
    return launch_scan<T>(scan_kernel<T>, p, grid, T::scan_bytes(p.pieces), stream);
  });
}

}  // namespace wscl::cuda
