// What the first scan left of a row becomes its nearest centroid and the distance to it: of the lanes' best,
// those within twice the bound of the highest are compared in float64. Where a lane's second best is within
// it too, there may be more: the row is put on the list of the second scan.
#include "kmeans_passes_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lanes));
  return x;
}

// The two highest scores among those that this lane reads, and the column of the highest.
struct LaneState {
  float best = -INFINITY, second = -INFINITY;
  int32_t column = 0;

  __device__ __forceinline__ LaneState(const KMeansBlock& b, int row) {
    for (int e = threadIdx.x % 32; e < kLanes * b.splits; e += 32) {
      const int64_t at = (int64_t(e / kLanes) * b.count + row) * kLanes + e % kLanes;
      const float score = b.best[at];
      second = fmaxf(second, fmaxf(b.second[at], fminf(score, best)));
      if (score > best) {
        best = score;
        column = b.column[at];
      }
    }
  }
};

// ‖x − c‖² in float where its range allows: no digits cancel there.
template <class In>
__device__ __forceinline__ double distance_to(const KMeansTable& t, const In* x, double inverse,
                                              int64_t column) {
  if (!t.cosine) {
    const float* centroid = t.centroids + column * t.d;
    float sum = 0;
    for (int64_t c = threadIdx.x % 32; c < t.d; c += 32) {
      const float apart = to_float(x[c]) - centroid[c];
      sum = fmaf(apart, apart, sum);
    }
    sum = warp_sum(sum);
    if (sum > 1e-25f && sum < 1e37f) return sum;
  }
  return exact_distance(t, x, inverse, column);
}

// A warp for each row.
template <class In>
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const KMeansProblem p, const KMeansTable t, const KMeansBlock b) {
  const int row = static_cast<int>((int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32);
  const int lane = threadIdx.x % 32;
  if (row >= b.count) return;
  LaneState state(b, row);
  if (p.top > 1) {
    // The lowest of the `top` best that the lanes kept is no higher than the true one.
    float least = 0;
    for (int e = 0; e < p.top; ++e) {
      least = warp_max(state.best);
      const uint32_t owners = __ballot_sync(kFullWarp, state.best == least);
      if (lane == __ffs(owners) - 1) {
        state.best = state.second;
        state.second = -INFINITY;
      }
    }
    if (lane) return;
    b.list[row] = row;
    b.least[row] = least - b.margin[row];
    if (row == 0) *b.undecided = b.count;
    return;
  }

  const In* x = row_of<In>(p, b.first + row);
  const double inverse = t.cosine ? b.inverse[row] : 1;
  int64_t nearest = 0;
  double distance = 1;
  if (inverse != 0) {  // else all are at distance 1
    const float least = warp_max(state.best) - b.margin[row];
    uint32_t candidates = __ballot_sync(kFullWarp, state.best >= least);
    if (__any_sync(kFullWarp, state.second >= least)) {
      if (lane) return;
      const int at = atomicAdd(b.undecided, 1);
      b.list[at] = row;
      b.least[at] = least;
      return;
    }
    if (candidates & (candidates - 1)) {
      distance = INFINITY;
      for (; candidates; candidates &= candidates - 1) {
        const int64_t column = __shfl_sync(kFullWarp, state.column, __ffs(candidates) - 1);
        const double apart = exact_distance(t, x, inverse, column);
        if (apart < distance || (apart == distance && column < nearest)) {
          nearest = column;
          distance = apart;
        }
      }
    } else if (candidates) {  // there is none for a row that is not finite
      nearest = __shfl_sync(kFullWarp, state.column, __ffs(candidates) - 1);
    }
    distance = distance_to(t, x, inverse, nearest);
  }
  if (lane) return;
  p.assignment[b.first + row] = nearest;
  p.distance[b.first + row] = saturate(distance);
  b.near[row] = distance;
}

}  // namespace

cudaError_t decide(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                   cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(block.undecided, 0, sizeof(*block.undecided), stream);
  if (error) return error;
  with_element(p.precision, [&](auto* element) {
    decide_kernel<std::remove_pointer_t<decltype(element)>>
        <<<blocks_for(block.count, kWarps), kThreads, 0, stream>>>(p, table, block);
  });
  return cudaGetLastError();
}

}  // namespace wscl::cuda
