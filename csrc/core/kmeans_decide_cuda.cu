// What the first scan left of a row becomes its nearest centroid and the distance to it: of the lanes' best,
// those within twice the bound of the highest are compared in float64. Where a lane's second best is within
// it too, there may be more: the row is put on the list of the second scan.
#include "kmeans_passes_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kThreads = 128;

// The two highest scores among those that this lane reads, and the column of the highest.
template <class G>
struct LaneState {
  float best = -INFINITY, second = -INFINITY;
  int32_t column = 0;

  __device__ __forceinline__ LaneState(const KMeansBlock& b, int row) {
    for (int e = G::lane(); e < kLanes * b.splits; e += G::kLanesInGroup) {
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
template <class G, class In>
__device__ __forceinline__ double distance_to(const KMeansTable& t, const In* x, double inverse,
                                              int64_t column) {
  float sum = 0;
  if (!t.cosine) {
    const float* centroid = t.centroids + column * t.d;
    for (int64_t c = G::lane(); c < t.d; c += G::kLanesInGroup) {
      const float apart = to_float(x[c]) - centroid[c];
      sum = fmaf(apart, apart, sum);
    }
    sum = G::sum(sum);
  }
  const bool in_range = sum > 1e-25f && sum < 1e37f;
  if (__all_sync(kFullWarp, in_range)) return sum;
  const double exact = exact_distance<G>(t, x, inverse, column);
  return in_range ? sum : exact;
}

// Every row goes on the list. The lowest of the `top` best scores that its lanes kept is no higher than the
// true one.
template <class G>
__device__ __forceinline__ void list_all(const KMeansProblem& p, const KMeansBlock& b, int row, bool live,
                                         LaneState<G>& state) {
  float least = 0;
  for (int e = 0; e < p.top; ++e) {
    least = G::max(state.best);
    const uint32_t owners = G::ballot(state.best == least);
    if (static_cast<int>(threadIdx.x % 32) == __ffs(owners) - 1) {
      state.best = state.second;
      state.second = -INFINITY;
    }
  }
  if (G::lane() || !live) return;
  b.list[row] = row;
  b.least[row] = least - b.margin[row];
  if (row == 0) *b.undecided = b.count;
}

// A group of lanes for each row; those past the last do as the last does, and write nothing.
template <class In>
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const KMeansProblem p, const KMeansTable t, const KMeansBlock b) {
  using G = RowGroup<In>;
  const bool live = G::index() < b.count;
  const int row = live ? static_cast<int>(G::index()) : b.count - 1;
  LaneState<G> state(b, row);
  if (p.top > 1) {
    list_all(p, b, row, live, state);
    return;
  }

  const In* x = row_of<In>(p, b.first + row);
  const double inverse = t.cosine ? b.inverse[row] : 1;
  const float least = G::max(state.best) - b.margin[row];
  const bool undirected = inverse == 0;  // then all are at distance 1
  uint32_t candidates = G::ballot(state.best >= least);
  if (undirected) {
    candidates = 0;
    state.second = -INFINITY;
  }
  const bool undecided = G::ballot(state.second >= least) != 0;
  if (undecided) candidates = 0;
  // There is no candidate for a row that is not finite.
  const int32_t first = __shfl_sync(kFullWarp, state.column, max(0, __ffs(candidates) - 1));
  int64_t nearest = candidates ? first : 0;
  if (__any_sync(kFullWarp, (candidates & (candidates - 1)) != 0)) {
    double least_apart = INFINITY;
    while (__any_sync(kFullWarp, candidates != 0)) {
      const int from = candidates ? __ffs(candidates) - 1 : threadIdx.x % 32;
      const int32_t other = __shfl_sync(kFullWarp, state.column, from);
      const int64_t column = candidates ? other : nearest;
      const double apart = exact_distance<G>(t, x, inverse, column);
      if (candidates && (apart < least_apart || (apart == least_apart && column < nearest))) {
        nearest = column;
        least_apart = apart;
      }
      candidates &= candidates - 1;
    }
  }
  const double to_nearest = distance_to<G>(t, x, inverse, nearest);
  if (G::lane() || !live) return;
  if (undecided) {
    const int at = atomicAdd(b.undecided, 1);
    b.list[at] = row;
    b.least[at] = least;
    return;
  }
  const double distance = undirected ? 1 : to_nearest;
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
    using In = std::remove_pointer_t<decltype(element)>;
    const unsigned blocks = blocks_for(block.count, kThreads / RowGroup<In>::kLanesInGroup);
    decide_kernel<In><<<blocks, kThreads, 0, stream>>>(p, table, block);
  });
  return cudaGetLastError();
}

}  // namespace wscl::cuda
