// The second scan, of the rows that the first left undecided: every score that reaches its row's bound has the
// distance taken in float64 by the whole warp, and the nearest few are kept.
#include <climits>

#include "kmeans_scan_cuda.cuh"

namespace wscl::cuda {
namespace {

// The nearest `top` so far, in order; of equals the lowest column first.
__device__ __forceinline__ void insert(double* distance, int32_t* column, int top, double candidate,
                                       int32_t of) {
  int place = top;
  for (; place > 0; --place) {
    const double before = distance[place - 1];
    if (before < candidate || (before == candidate && column[place - 1] < of)) break;
    if (place < top) {
      distance[place] = before;
      column[place] = column[place - 1];
    }
  }
  if (place >= top) return;
  distance[place] = candidate;
  column[place] = of;
}

template <class In>
struct Candidates {
  const ScanParams& p;
  const int row0;          // of this CTA
  double* const distance;  // [kScanRows][top] in shared memory
  int32_t* const column;
  float least[2][2];

  // Bit 16 i + place: the score of the thread's i-th row at that place of the tile.
  template <class S>
  __device__ __forceinline__ void operator()(int tile, const S& s) {
    uint64_t hits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t of_row = 0;
#pragma unroll
      for (int place = 0; place < 16; ++place)
        of_row |= uint32_t(s[i / 2][place / 2][i % 2 * 2 + place % 2] >= least[i / 2][i % 2]) << place;
      hits |= uint64_t(of_row) << 16 * i;
    }
    while (const uint32_t lanes = __ballot_sync(kFullWarp, hits != 0)) {
      const int lane = __ffs(lanes) - 1, bit = __shfl_sync(kFullWarp, __ffsll(hits) - 1, lane);
      const int position = __shfl_sync(kFullWarp, row_position(bit / 32, bit / 16 % 2), lane);
      if (static_cast<int>(threadIdx.x % 32) == lane) hits &= hits - 1;
      look(position, int64_t(tile) * kScanColumns + column_in_tile(lane, bit / 2 % 8, bit % 2));
    }
  }

  __device__ __forceinline__ void look(int position, int64_t candidate) const {
    if (candidate >= p.table.k) return;
    const int64_t row = p.block.list[row0 + position];
    const double apart = exact_distance<Warp>(p.table, row_of<In>(p.problem, p.block.first + row),
                                              p.table.cosine ? p.block.inverse[row] : 1, candidate);
    const int top = p.problem.top;
    if (threadIdx.x % 32 == 0)
      insert(distance + position * top, column + position * top, top, apart, static_cast<int32_t>(candidate));
  }
};

template <class T, class In>
__global__ void __launch_bounds__(T::kThreads, 2) scan_again_kernel(const ScanParams p) {
  extern __shared__ __align__(512) char shared[];
  const KMeansBlock& b = p.block;
  const int top = p.problem.top, count = *b.undecided, warp_row = threadIdx.x / 32 * 32;
  double* const distance = reinterpret_cast<double*>(shared + T::scan_bytes(p.pieces));
  int32_t* const column = reinterpret_cast<int32_t*>(distance + T::kRows * top);
  const Parts cut(count, gridDim.x);
  const int parts = min(cut.parts, p.tiles);
  for (int item = blockIdx.x; item < cut.blocks * parts; item += gridDim.x) {
    const int row0 = item % cut.blocks * T::kRows, part = item / cut.blocks;
    for (int i = threadIdx.x % 32; i < 32 * top; i += 32) {
      distance[warp_row * top + i] = INFINITY;
      column[warp_row * top + i] = INT_MAX;
    }
    Candidates<In> candidates = {p, row0, distance, column, {}};
    float factor[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = row0 + row_position(i / 2, i % 2);
      factor[i / 2][i % 2] = at < count ? b.factor[b.list[at]] : 0;
      candidates.least[i / 2][i % 2] = at < count ? b.least[at] : INFINITY;
    }
    __syncwarp();
    scan_tiles<T>(p, {b.rows, p.table.depth, b.list, count}, shared_address(shared), row0,
                  static_cast<int>(int64_t(p.tiles) * part / parts),
                  static_cast<int>(int64_t(p.tiles) * (part + 1) / parts), factor, candidates);
    __syncthreads();  // every warp is done with its pieces, before the next item's come
    const int64_t to = (int64_t(part) * cut.blocks * T::kRows + row0 + warp_row) * top;
    for (int i = threadIdx.x % 32; i < 32 * top; i += 32) {
      b.again_distance[to + i] = distance[warp_row * top + i];
      b.again_column[to + i] = column[warp_row * top + i];
    }
    __syncwarp();
  }
}

// A thread for each row of the list.
__global__ void merge_kernel(const ScanParams p, const int ctas) {
  const KMeansBlock& b = p.block;
  const int top = p.problem.top, count = *b.undecided;
  const Parts cut(count, ctas);
  const int parts = min(cut.parts, p.tiles);
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
    double distance[kMostTop];
    int32_t column[kMostTop];
    for (int e = 0; e < top; ++e) {
      distance[e] = INFINITY;
      column[e] = INT_MAX;
    }
    for (int part = 0; part < parts; ++part) {
      const int64_t from = (int64_t(part) * cut.blocks * kScanRows + at) * top;
      for (int e = 0; e < top; ++e)
        if (b.again_column[from + e] != INT_MAX)
          insert(distance, column, top, b.again_distance[from + e], b.again_column[from + e]);
    }
    const int64_t row = b.list[at];
    const bool undirected = p.table.cosine && b.inverse[row] == 0;  // all are at distance 1
    for (int e = 0; e < top; ++e) {
      const bool none = undirected || column[e] == INT_MAX;  // the latter: of a row that is not finite
      p.problem.assignment[(b.first + row) * top + e] = none ? e : column[e];
      p.problem.distance[(b.first + row) * top + e] = none ? 1.f : saturate(distance[e]);
    }
    b.near[row] = undirected ? 1 : distance[0];
  }
}

ScanParams params_of(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block) {
  return {p, table, block, static_cast<int>(table.depth / kPiece),
          static_cast<int>(table.columns_padded / kScanColumns)};
}

}  // namespace

cudaError_t scan_again(const KMeansProblem& problem, const KMeansTable& table, const KMeansBlock& block,
                       cudaStream_t stream) {
  const ScanParams p = params_of(problem, table, block);
  const int extra = kScanRows * problem.top * static_cast<int>(sizeof(double) + sizeof(int32_t));
  return with_element(problem.precision, [&](auto* element) {
    using In = std::remove_pointer_t<decltype(element)>;
    return with_tiling(p.pieces, extra, [&](auto tiling) {
      using T = decltype(tiling);
      return launch_scan<T>(scan_again_kernel<T, In>, p, dim3(block.scan_ctas), T::scan_bytes(p.pieces) + extra,
                            stream);
    });
  });
}

cudaError_t merge_again(const KMeansProblem& problem, const KMeansTable& table, const KMeansBlock& block,
                        cudaStream_t stream) {
  merge_kernel<<<blocks_for(std::min(block.count, 1 << 16)), kBlock, 0, stream>>>(
      params_of(problem, table, block), block.scan_ctas);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
