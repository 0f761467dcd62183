#include "gradient_vectors_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr float kSafeRange = 60;  // log2 of the spread of weights that share one shift

__device__ float block_max(float x) {
  __shared__ float of_warp[32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warp[threadIdx.x % 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// One CTA: O(n) work, and no atomics.
__global__ void __launch_bounds__(kThreads) scalars_kernel(const Upstream up) {
  const int64_t n = up.problem.n;
  const int sets = up.problem.inner && up.given.count ? 2 : 1;
  float largest = 0, low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    largest = fmaxf(largest, fabsf(up.gradient(i)));
    for (int s = 0; s < sets; ++s) {
      const double sum = up.given.stats[(2 * s + 1) * n + i];
      if (sum == 0) continue;
      const float lse = static_cast<float>(up.given.stats[2 * s * n + i] + log2(sum));
      low[s] = fminf(low[s], lse);
      high[s] = fmaxf(high[s], lse);
    }
  }
  largest = block_max(largest);
  for (int s = 0; s < sets; ++s) {
    low[s] = -block_max(-low[s]);
    high[s] = block_max(high[s]);
  }
  if (threadIdx.x) return;
  // float16: the largest weight, a gradient times a probability, comes near 2^13.
  float boost = 1;
  if (up.problem.precision == Precision::kFloat16 && largest > 0 && largest < INFINITY)
    boost = exp2f(fminf(fmaxf(12 - static_cast<float>(ilogbf(largest)), -60.f), 60.f));
  up.scalars->boost = boost;
  for (int s = 0; s < 2; ++s) {
    const bool one = s < sets && low[s] <= high[s] && high[s] - low[s] <= kSafeRange;
    up.scalars->one_shift[s] = one;
    up.scalars->shift[s] = one ? ceilf(high[s]) : 0.f;
  }
}

// A thread for each query, in CTAs of two words of valid bits.
__global__ void __launch_bounds__(2 * kValidBits)
    vectors_kernel(const Upstream up, const GradientVectors v, const Vectors which) {
  const InfoNCEProblem& p = up.problem;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool live = at < p.n;
  const bool second = which == Vectors::kSecond;
  const int64_t i = !live ? 0 : which == Vectors::kFirst ? at : p.query_order[at];
  const double* stats = up.given.stats + (second ? 2 * p.n : 0);
  const float boost = up.scalars->boost;
  float shift = 0, weight = 0, share = 0;
  bool valid = false;
  int32_t excluded = -1;
  if (live) {
    const float gradient = up.gradient(i);
    const int64_t count = up.given.count ? up.given.count[i] : 0;
    // Where the queries are the keys, one without a positive still is the others' negative.
    valid = up.clusters.query_segment[i] >= 0 && (p.self || up.takes_part(i));
    if (count > 0) share = gradient / static_cast<float>(count);
    const double sum = stats[p.n + i];
    const bool one = p.self && up.scalars->one_shift[second];
    if (one) shift = up.scalars->shift[second];
    if (sum != 0) {
      if (!one) shift = static_cast<float>(stats[i]);
      weight = static_cast<float>(gradient / sum * (one ? exp2(shift - stats[i]) : 1.) * boost);
    }
    // Rows of keys lie in key_order for "in", else where they are.
    const int32_t own = up.clusters.own[i];
    if (valid && own >= 0) excluded = p.inner ? up.ranges.key_position[own] : own;
    if (which == Vectors::kFirst && up.share) up.share[i] = share;
  }
  if (at < v.padded) {
    v.shift[at] = shift;
    v.weight[at] = weight;
    v.excluded[at] = excluded;
    v.excluded_weight[at] = live && up.clusters.own_positive[i] ? share * boost : 0.f;
  }
  const unsigned bits = __ballot_sync(0xffffffffu, valid);
  const int least = __reduce_min_sync(0xffffffffu, excluded < 0 ? INT_MAX : excluded);
  const int greatest = __reduce_max_sync(0xffffffffu, excluded);
  __shared__ int2 range_of[4];
  if (threadIdx.x % 32 == 0) {
    range_of[threadIdx.x / 32] = make_int2(least, greatest);
    if (at < v.padded) reinterpret_cast<uint32_t*>(v.valid)[at / 32] = bits;
  }
  __syncthreads();
  if (threadIdx.x % kValidBits || at >= v.padded) return;
  const int2 a = range_of[threadIdx.x / 32], b = range_of[threadIdx.x / 32 + 1];
  v.excluded_range[at / kValidBits] = make_int2(min(a.x, b.x), max(a.y, b.y));
}

}  // namespace

GradientVectors::GradientVectors(const InfoNCEProblem& p, Workspace& space)
    : padded((p.n + kValidBits - 1) / kValidBits * kValidBits),
      shift(space.take<float>(padded)),
      weight(space.take<float>(padded)),
      excluded(space.take<int32_t>(padded)),
      excluded_weight(space.take<float>(padded)),
      excluded_range(space.take<int2>(padded / kValidBits)),
      valid(space.take<uint64_t>(padded / kValidBits)) {}

void GradientVectors::set_columns(SimilarityParams& pass, bool with_excluded, bool with_weight) const {
  pass.column_shift = shift;
  pass.column_weight = weight;
  pass.y_valid = valid;
  if (!with_excluded) return;
  pass.column_excluded = excluded;
  pass.excluded_range = excluded_range;
  if (with_weight) pass.excluded_weight = excluded_weight;
}

cudaError_t find_scalars(const Upstream& up, cudaStream_t stream) {
  scalars_kernel<<<1, kThreads, 0, stream>>>(up);
  return cudaGetLastError();
}

cudaError_t find_vectors(const Upstream& up, const GradientVectors& vectors, Vectors which,
                         cudaStream_t stream) {
  if (vectors.padded)
    vectors_kernel<<<blocks_for(vectors.padded, 2 * kValidBits), 2 * kValidBits, 0, stream>>>(up, vectors,
                                                                                              which);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
