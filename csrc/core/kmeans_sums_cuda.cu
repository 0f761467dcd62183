// The sums of clusters over sorted rows (see kmeans_sums_cuda.cuh): a CTA adds up a chunk of them, a thread one
// column; what a chunk has only a part of is added up by a second kernel. Memory: the rows once.
#include "kmeans_sums_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kChunk = 128;  // rows that one CTA adds up
constexpr int kAtOnce = 8;   // loads in flight

struct SumsParams {
  KMeansProblem problem;
  KMeansBlock block;
  const int32_t *keys, *order;
  ClusterSums to;
};

__global__ void find_begins(const SumsParams p) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j > p.problem.k) return;
  int low = 0, high = p.block.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.keys[middle] < j)
      low = middle + 1;
    else
      high = middle;
  }
  p.to.begin[j] = low;
}

// Where the sum of a cluster's column lies; the column past d is that of the weights.
__device__ __forceinline__ double* sum_at(const KMeansProblem& p, int64_t cluster, int64_t column) {
  return column < p.d ? p.sums + cluster * p.d + column : p.weight_sums + cluster;
}

template <class In>
__global__ void __launch_bounds__(kChunk) add_chunk(const SumsParams p) {
  __shared__ int32_t row_at[kChunk];
  __shared__ int32_t cluster_of[kChunk + 2];  // with those before and after
  __shared__ double weight_of[kChunk], factor_of[kChunk];
  const KMeansProblem& problem = p.problem;
  const int count = p.block.count, first = blockIdx.x * kChunk, here = min(kChunk, count - first);
  for (int i = threadIdx.x; i < kChunk + 2; i += kChunk) {
    const int at = first + i - 1;
    cluster_of[i] = at >= 0 && at < count ? p.keys[at] : -1;
  }
  if (static_cast<int>(threadIdx.x) < here) {
    const int row = p.order[first + threadIdx.x];
    const double weight = problem.weights ? problem.weights[p.block.first + row] : 1;
    row_at[threadIdx.x] = row;
    weight_of[threadIdx.x] = weight;
    factor_of[threadIdx.x] = problem.cosine ? weight * p.block.inverse[row] : weight;
  }
  __syncthreads();  // the chunk's rows are known to every thread
  const int64_t column = int64_t(blockIdx.y) * kChunk + threadIdx.x;
  if (column >= p.to.width) return;
  const bool coordinate = column < problem.d;
  const In* const x = row_of<In>(problem, p.block.first) + (coordinate ? column : 0);
  double sum = 0;
  bool began_before = cluster_of[0] == cluster_of[1];
  for (int i0 = 0; i0 < here; i0 += kAtOnce) {
    float number[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      number[i] = i0 + i < here && coordinate ? to_float(x[row_at[i0 + i] * problem.x_stride]) : 0.f;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = i0 + i;
      if (at >= here) break;
      sum += coordinate ? factor_of[at] * static_cast<double>(number[i]) : weight_of[at];
      const int32_t cluster = cluster_of[at + 1];
      const bool ends = cluster_of[at + 2] != cluster;
      if (!ends && at + 1 < here) continue;
      if (began_before)
        p.to.heads[blockIdx.x * p.to.width + column] = sum;
      else if (ends)
        *sum_at(problem, cluster, column) += sum;
      else
        p.to.tails[blockIdx.x * p.to.width + column] = sum;
      sum = 0;
      began_before = false;
    }
  }
}

// Counts, and the clusters that more than one chunk has a part of. A CTA for each cluster.
__global__ void add_parts(const SumsParams p) {
  const int64_t cluster = blockIdx.x;
  const int begin = p.to.begin[cluster], end = p.to.begin[cluster + 1];
  if (begin == end) return;
  if (threadIdx.x == 0 && p.problem.counts) p.problem.counts[cluster] += end - begin;
  const int first = begin / kChunk, last = (end - 1) / kChunk;
  if (first == last) return;
  for (int64_t column = threadIdx.x; column < p.to.width; column += blockDim.x) {
    double sum = p.to.tails[first * p.to.width + column];
    for (int chunk = first + 1; chunk <= last; ++chunk) sum += p.to.heads[chunk * p.to.width + column];
    *sum_at(p.problem, cluster, column) += sum;
  }
}

__device__ __forceinline__ double block_sum(double x, double* of_warp) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x < kChunk / 32 ? of_warp[threadIdx.x] : 0;
  return warp_sum(x);
}

__global__ void __launch_bounds__(kChunk) add_distances(const SumsParams p) {
  __shared__ double of_warp[kChunk / 32];
  const int row = blockIdx.x * kChunk + threadIdx.x;
  double share = 0;
  if (row < p.block.count) {
    const double weight = p.problem.weights ? p.problem.weights[p.block.first + row] : 1;
    share = weight * p.block.near[row];
  }
  const double sum = block_sum(share, of_warp);
  if (threadIdx.x == 0) p.to.inertia_parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kChunk) add_inertia(const SumsParams p, const int parts) {
  __shared__ double of_warp[kChunk / 32];
  double share = 0;
  for (int i = threadIdx.x; i < parts; i += kChunk) share += p.to.inertia_parts[i];
  const double sum = block_sum(share, of_warp);
  if (threadIdx.x == 0) *p.problem.inertia += sum;
}

}  // namespace

ClusterSums::ClusterSums(const KMeansProblem& p, int most_rows, Workspace& space)
    : sort(most_rows, p.k, space),
      width(p.d + (p.weights ? 1 : 0)),
      begin(space.take<int32_t>(p.k + 1)),
      heads(space.take<double>(int64_t(blocks_for(most_rows, kChunk)) * width)),
      tails(space.take<double>(int64_t(blocks_for(most_rows, kChunk)) * width)),
      inertia_parts(space.take<double>(blocks_for(most_rows, kChunk))) {}

cudaError_t ClusterSums::add(const KMeansProblem& p, const KMeansBlock& block, cudaStream_t stream) const {
  const cudaError_t error = sort.run(p.assignment + block.first, block.count, stream);
  if (error) return error;
  const SumsParams params = {p, block, sort.sorted_keys(), sort.sorted_order(), *this};
  const unsigned chunks = blocks_for(block.count, kChunk);
  find_begins<<<blocks_for(p.k + 1), kBlock, 0, stream>>>(params);
  if (width) {
    with_element(p.precision, [&](auto* element) {
      add_chunk<std::remove_pointer_t<decltype(element)>>
          <<<dim3(chunks, blocks_for(width, kChunk)), kChunk, 0, stream>>>(params);
    });
  }
  add_parts<<<static_cast<unsigned>(p.k), 128, 0, stream>>>(params);
  add_distances<<<chunks, kChunk, 0, stream>>>(params);
  add_inertia<<<1, kChunk, 0, stream>>>(params, static_cast<int>(chunks));
  return cudaGetLastError();
}

}  // namespace wscl::cuda
