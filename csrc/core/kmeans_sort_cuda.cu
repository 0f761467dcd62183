// A stable radix sort of rows by cluster: a pass for every eight bits of the number of clusters, and three
// kernels a pass: count the digits of each tile, turn counts into places, move the rows.
#include <algorithm>

#include "kmeans_sums_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kDigits = 256;
constexpr int kThreads = kDigits;  // a thread is a digit or a row, as it comes
constexpr int kWarps = kThreads / 32;
constexpr int kRounds = 4;
constexpr int kTile = kRounds * kThreads;

struct SortPass {
  const int64_t* ids;  // what the first pass reads, in the rows' own order; null for the others
  const int32_t *keys, *order;
  int32_t *keys_out, *order_out;
  int32_t *digits, *totals;
  int count, tiles, shift;

  __device__ __forceinline__ int32_t key(int at) const {
    return ids ? static_cast<int32_t>(ids[at]) : keys[at];
  }
  __device__ __forceinline__ int digit(int32_t key) const {
    return (key >> shift) & (kDigits - 1);
  }
};

__global__ void __launch_bounds__(kThreads) count_digits(const SortPass p) {
  __shared__ int32_t counted[kDigits];
  counted[threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < kRounds; ++i) {
    const int at = blockIdx.x * kTile + i * kThreads + threadIdx.x;
    if (at < p.count) atomicAdd(&counted[p.digit(p.key(at))], 1);
  }
  __syncthreads();
  p.digits[threadIdx.x * p.tiles + blockIdx.x] = counted[threadIdx.x];
}

// The sum of what threads before this one hold; `total` of all. Barriers before and after are the caller's.
__device__ __forceinline__ int32_t sum_before(int32_t x, int32_t* of_warp, int32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, lanes);
    if (lane >= lanes) sum += before;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int32_t earlier = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) earlier = all;
    all += of_warp[w];
  }
  *total = all;
  return earlier + sum - x;
}

// A CTA for each digit: counts become the rows of that digit in the tiles before.
__global__ void __launch_bounds__(kThreads) place_tiles(const SortPass p) {
  __shared__ int32_t of_warp[kWarps];
  int32_t* const digits = p.digits + blockIdx.x * p.tiles;
  int32_t before = 0;
  for (int i = 0; i < p.tiles; i += kThreads) {
    const int tile = i + threadIdx.x;
    int32_t total;
    const int32_t place = sum_before(tile < p.tiles ? digits[tile] : 0, of_warp, &total);
    if (tile < p.tiles) digits[tile] = before + place;
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) p.totals[blockIdx.x] = before;
}

// A CTA moves a tile, 256 rows at a time in their order.
__global__ void __launch_bounds__(kThreads) move_rows(const SortPass p) {
  __shared__ int32_t of_warp[kWarps], next[kDigits];  // where the next row of a digit goes
  __shared__ int32_t counted[kWarps][kDigits];
  const int warp = threadIdx.x / 32;
  int32_t total;
  next[threadIdx.x] =
      sum_before(p.totals[threadIdx.x], of_warp, &total) + p.digits[threadIdx.x * p.tiles + blockIdx.x];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) counted[w][threadIdx.x] = 0;
  for (int i = 0; i < kRounds; ++i) {
    __syncthreads();  // `next` and `counted` are as this round finds them
    const int at = blockIdx.x * kTile + i * kThreads + threadIdx.x;
    const bool live = at < p.count;
    const int32_t key = live ? p.key(at) : 0;
    const int digit = p.digit(key);
    const uint32_t peers = __match_any_sync(kFullWarp, live ? digit : kDigits);
    const int rank = __popc(peers & ((1u << threadIdx.x % 32) - 1));
    if (live && rank == 0) counted[warp][digit] = __popc(peers);
    __syncthreads();
    if (live) {
      int32_t to = next[digit] + rank;
      for (int w = 0; w < warp; ++w) to += counted[w][digit];
      p.keys_out[to] = key;
      p.order_out[to] = p.ids ? at : p.order[at];
    }
    __syncthreads();  // everyone has read them
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      next[threadIdx.x] += counted[w][threadIdx.x];
      counted[w][threadIdx.x] = 0;
    }
  }
}

}  // namespace

ClusterSort::ClusterSort(int most_rows, int64_t k, Workspace& space) : passes(1) {
  while (passes < 4 && k > int64_t(1) << 8 * passes) ++passes;
  for (int i = 0; i < 2; ++i) {
    keys[i] = space.take<int32_t>(most_rows);
    order[i] = space.take<int32_t>(most_rows);
  }
  digits = space.take<int32_t>(int64_t(kDigits) * blocks_for(most_rows, kTile));
  totals = space.take<int32_t>(kDigits);
}

cudaError_t ClusterSort::run(const int64_t* assignment, int count, cudaStream_t stream) const {
  const int tiles = static_cast<int>(blocks_for(count, kTile));
  for (int i = 0; i < passes; ++i) {
    const int from = i % 2, to = 1 - from;
    const SortPass pass = {i == 0 ? assignment : nullptr,
                           keys[from],
                           order[from],
                           keys[to],
                           order[to],
                           digits,
                           totals,
                           count,
                           tiles,
                           8 * i};
    count_digits<<<tiles, kThreads, 0, stream>>>(pass);
    place_tiles<<<kDigits, kThreads, 0, stream>>>(pass);
    move_rows<<<tiles, kThreads, 0, stream>>>(pass);
  }
  return cudaGetLastError();
}

}  // namespace wscl::cuda
