#include "gradient_vectors_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr float kSafeRange = 60;  // log2 of the spread of weights that share one shift

// A warp for each set.
__global__ void merge(Precision precision, int parts, GradientScalars* to) {
  const int set = threadIdx.x / 32;
  Extremes x;
  for (int i = threadIdx.x % 32; i < parts; i += 32) x.add(to->parts[set][i]);
  for (int lanes = 16; lanes > 0; lanes /= 2)
    x.add({__shfl_xor_sync(0xffffffffu, x.largest, lanes), __shfl_xor_sync(0xffffffffu, x.low, lanes),
           __shfl_xor_sync(0xffffffffu, x.high, lanes)});
  if (threadIdx.x % 32) return;
  if (set == 0) {
    // float16: the largest weight, a gradient times a probability, comes near 2^13. The second set has the
    // same.
    float boost = 1;
    if (precision == Precision::kFloat16 && x.largest > 0 && x.largest < INFINITY)
      boost = exp2f(fminf(fmaxf(12 - static_cast<float>(ilogbf(x.largest)), -60.f), 60.f));
    to->boost = boost;
  }
  const bool one = x.low <= x.high && x.high - x.low <= kSafeRange;
  // What rows summed under their shift may lie above it: a log-sum-exp has to be nearer by far.
  const bool far = fmaxf(fabsf(x.low), fabsf(x.high)) > kFarShift / 2;
  to->shifts[set] = far ? Shifts::kFar : one ? Shifts::kOne : Shifts::kEach;
  to->shift[set] = one ? ceilf(x.high) : 0.f;
}

struct AddRow {
  Upstream up;

  __device__ __forceinline__ void operator()(int64_t i, int set, Extremes& to) const {
    const int64_t n = up.problem.n;
    const double sum = up.given.stats[(2 * set + 1) * n + i];
    if (sum != 0)
      to.add(up.gradient(i),
             static_cast<float>(up.given.stats[2 * set * n + i]) + __log2f(static_cast<float>(sum)));
  }
};

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
    const bool one = p.self && up.scalars->shifts[second] == Shifts::kOne;
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

cudaError_t merge_extremes(Precision precision, int sets, int parts, GradientScalars* to, cudaStream_t stream) {
  merge<<<1, 32 * sets, 0, stream>>>(precision, parts, to);
  return cudaGetLastError();
}

cudaError_t find_scalars(const Upstream& up, cudaStream_t stream) {
  const InfoNCEProblem& p = up.problem;
  return find_scalars(p.precision, p.inner && up.given.count ? 2 : 1, p.n, AddRow{up}, up.scalars, stream);
}

cudaError_t find_vectors(const Upstream& up, const GradientVectors& vectors, Vectors which,
                         cudaStream_t stream) {
  const int64_t* order = which == Vectors::kFirst ? nullptr : up.problem.query_order;
  return fill(vectors, up.problem.n, order, QueryValues{up, which}, stream);
}

}  // namespace wscl::cuda
