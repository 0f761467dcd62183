#include "gradient_vectors_cuda.cuh"

namespace wscl::cuda {
namespace {

// One CTA: O(n) work, and no atomics.
__global__ void __launch_bounds__(kReduceThreads) scalars_kernel(const Upstream up) {
  const int64_t n = up.problem.n;
  const int sets = up.problem.inner && up.given.count ? 2 : 1;
  for (int s = 0; s < sets; ++s) {
    ScalarsOf scalars;
    for (int64_t i = threadIdx.x; i < n; i += kReduceThreads) {
      const double sum = up.given.stats[(2 * s + 1) * n + i];
      if (sum != 0)
        scalars.add(up.gradient(i),
                    static_cast<float>(up.given.stats[2 * s * n + i]) + __log2f(static_cast<float>(sum)));
    }
    scalars.store(up.problem.precision, up.scalars, s);
  }
}

struct QueryValues {
  Upstream up;
  Vectors which;

  __device__ __forceinline__ ColumnValues operator()(int64_t i) const {
    const InfoNCEProblem& p = up.problem;
    const bool second = which == Vectors::kSecond;
    const double* stats = up.given.stats + (second ? 2 * p.n : 0);
    const float gradient = up.gradient(i), boost = up.scalars->boost;
    const int64_t count = up.given.count ? up.given.count[i] : 0;
    const float share = count > 0 ? gradient / static_cast<float>(count) : 0.f;
    ColumnValues x;
    // Where the queries are the keys, one without a positive still is the others' negative.
    x.valid = up.clusters.query_segment[i] >= 0 && (p.self || up.takes_part(i));
    const double sum = stats[p.n + i];
    const bool one = p.self && up.scalars->one_shift[second];
    if (one) x.shift = up.scalars->shift[second];
    if (sum != 0) {
      if (!one) x.shift = static_cast<float>(stats[i]);
      x.weight = static_cast<float>(gradient / sum * (one ? exp2(x.shift - stats[i]) : 1.) * boost);
    }
    // Rows of keys lie in key_order for "in", else where they are.
    const int32_t own = up.clusters.own[i];
    if (x.valid && own >= 0) x.excluded = p.inner ? up.ranges.key_position[own] : own;
    if (up.clusters.own_positive[i]) x.excluded_weight = share * boost;
    if (which == Vectors::kFirst && up.share) up.share[i] = share;
    return x;
  }
};

}  // namespace

GradientVectors::GradientVectors(int64_t count, Workspace& space)
    : padded((count + kValidBits - 1) / kValidBits * kValidBits),
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
  scalars_kernel<<<1, kReduceThreads, 0, stream>>>(up);
  return cudaGetLastError();
}

cudaError_t find_vectors(const Upstream& up, const GradientVectors& vectors, Vectors which,
                         cudaStream_t stream) {
  const int64_t* order = which == Vectors::kFirst ? nullptr : up.problem.query_order;
  return fill(vectors, up.problem.n, order, QueryValues{up, which}, stream);
}

}  // namespace wscl::cuda
