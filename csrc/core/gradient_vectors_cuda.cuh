// What the backward passes say of every query: shift, weight, and which key it does not meet.
#pragma once

#include <climits>

#include "infonce_passes_cuda.cuh"

namespace wscl::cuda {

constexpr int kReduceThreads = 256;
constexpr int kMostParts = 64;

// Of rows' gradients and base-2 log-sum-exps.
struct Extremes {
  float largest = 0, low = INFINITY, high = -INFINITY;

  __device__ __forceinline__ void add(float gradient, float lse) {
    largest = fmaxf(largest, fabsf(gradient));
    low = fminf(low, lse);
    high = fmaxf(high, lse);
  }

  __device__ __forceinline__ void add(const Extremes& other) {
    largest = fmaxf(largest, other.largest);
    low = fminf(low, other.low);
    high = fmaxf(high, other.high);
  }
  // Over the CTA.
  __device__ void merge() {
    largest = block_max<kReduceThreads>(largest);
    low = -block_max<kReduceThreads>(-low);
    high = block_max<kReduceThreads>(high);
  }
};

// Numbers that are found on the device and stay there.
struct GradientScalars {
  float boost;       // a power of two that keeps float16 weights in the normal range; 1 elsewhere
  Shifts shifts[2];  // for all pairs and for the positives: what the rows' shifts are
  float shift[2];    // kOne: which
  Extremes parts[2][kMostParts];
};

// A set is a grid's row; `add(i, set, extremes)` adds the i-th of `count` rows.
template <class Add>
__global__ void __launch_bounds__(kReduceThreads)
    find_extremes(int64_t count, const Add add, GradientScalars* to) {
  Extremes extremes;
  for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kReduceThreads)
    add(i, static_cast<int>(blockIdx.y), extremes);
  extremes.merge();
  if (threadIdx.x == 0) to->parts[blockIdx.y][blockIdx.x] = extremes;
}
cudaError_t merge_extremes(Precision precision, int sets, int parts, GradientScalars* to, cudaStream_t stream);

// `sets`: 1 or 2.
template <class Add>
cudaError_t find_scalars(Precision precision, int sets, int64_t count, const Add& add, GradientScalars* to,
                         cudaStream_t stream) {
  const int parts = static_cast<int>(std::clamp<int64_t>(blocks_for(count, kReduceThreads), 1, kMostParts));
  find_extremes<<<dim3(parts, sets), kReduceThreads, 0, stream>>>(count, add, to);
  return merge_extremes(precision, sets, parts, to, stream);
}

struct GradientVectors {
  int64_t padded;          // queries, rounded up to whole words of valid bits
  float *shift, *weight;   // [padded]
  int32_t* excluded;       // [padded] the row of the key that a query does not meet, or −1
  float* excluded_weight;  // [padded] what its pair weighs instead
  int2* excluded_range;    // [padded / 64]
  uint64_t* valid;         // [padded / 64]

  GradientVectors() = default;
  GradientVectors(int64_t count, Workspace& space);
  void set_columns(SimilarityParams& pass, bool excluded, bool excluded_weight) const;
};

// Everything a query's gradient starts from.
struct Upstream {
  InfoNCEProblem problem;
  InfoNCEBackward given;
  Clusters clusters;
  MatchedRanges ranges;  // "in"
  GradientScalars* scalars;
  float* share;  // [n] g_i / |P(i)|

  // Whether a query's gradient goes anywhere: one of a bare log-sum-exp does where it meets a key.
  __device__ __forceinline__ bool takes_part(int64_t i) const {
    return given.count ? given.count[i] > 0 : given.stats[problem.n + i] != 0;
  }
  __device__ __forceinline__ float gradient(int64_t i) const {
    if (!takes_part(i)) return 0.f;
    return given.share ? *given.grad_loss * *given.share : given.grad_loss[i];
  }
};

// What a column says to the rows of a pass.
struct ColumnValues {
  bool valid = false;  // takes part
  float shift = 0, weight = 0;
  int32_t excluded = -1;      // the row that it does not meet
  float excluded_weight = 0;  // what that pair weighs instead
};

// A thread for each column, in CTAs of two words of valid bits. `of(i)` gives the values of column i, `order`
// (or null) the column at a position.
template <class Of>
__global__ void __launch_bounds__(2 * kValidBits)
    fill_vectors(const GradientVectors v, int64_t count, const int64_t* order, const Of of) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  ColumnValues x;
  if (at < count) x = of(order ? order[at] : at);
  if (at < v.padded) {
    v.shift[at] = x.shift;
    v.weight[at] = x.weight;
    v.excluded[at] = x.excluded;
    v.excluded_weight[at] = x.excluded_weight;
  }
  const unsigned bits = __ballot_sync(0xffffffffu, x.valid);
  const int least = __reduce_min_sync(0xffffffffu, x.excluded < 0 ? INT_MAX : x.excluded);
  const int greatest = __reduce_max_sync(0xffffffffu, x.excluded);
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

template <class Of>
cudaError_t fill(const GradientVectors& vectors, int64_t count, const int64_t* order, const Of& of,
                 cudaStream_t stream) {
  if (vectors.padded)
    fill_vectors<<<blocks_for(vectors.padded, 2 * kValidBits), 2 * kValidBits, 0, stream>>>(vectors, count,
                                                                                            order, of);
  return cudaGetLastError();
}

// kSecond: of the second pass of "in", in query_order; kOrdered: of the first, in query_order. `share` is
// written by kFirst.
enum class Vectors : int { kFirst, kSecond, kOrdered };
cudaError_t find_scalars(const Upstream& up, cudaStream_t stream);
cudaError_t find_vectors(const Upstream& up, const GradientVectors& vectors, Vectors which,
                         cudaStream_t stream);

}  // namespace wscl::cuda
