// What the backward passes say of every query: shift, weight, and which key it does not meet.
#pragma once

#include <climits>

#include "infonce_passes_cuda.cuh"

namespace wscl::cuda {

// Numbers that are found on the device and stay there.
struct GradientScalars {
  float boost;           // a power of two that keeps float16 weights in the normal range; 1 elsewhere
  int32_t one_shift[2];  // for all pairs and for the positives: whether one shift serves all rows
  float shift[2];        // and which
};

// How they are found, by one CTA: from the gradients and the base-2 log-sum-exps of rows.
constexpr int kReduceThreads = 1024;

struct ScalarsOf {
  static constexpr float kSafeRange = 60;  // log2 of the spread of weights that share one shift
  float largest = 0, low = INFINITY, high = -INFINITY;

  __device__ __forceinline__ void add(float gradient, float lse) {
    largest = fmaxf(largest, fabsf(gradient));
    low = fminf(low, lse);
    high = fmaxf(high, lse);
  }

  // Over the CTA; the boost is that of the first set.
  __device__ void store(Precision precision, GradientScalars* to, int set = 0) {
    largest = block_max(largest);
    low = -block_max(-low);
    high = block_max(high);
    if (threadIdx.x) return;
    // float16: the largest weight, a gradient times a probability, comes near 2^13.
    float boost = 1;
    if (precision == Precision::kFloat16 && largest > 0 && largest < INFINITY)
      boost = exp2f(fminf(fmaxf(12 - static_cast<float>(ilogbf(largest)), -60.f), 60.f));
    if (set == 0) to->boost = boost;
    const bool one = low <= high && high - low <= kSafeRange;
    to->one_shift[set] = one;
    to->shift[set] = one ? ceilf(high) : 0.f;
  }

 private:
  static __device__ float block_max(float x) {
    __shared__ float of_warp[kReduceThreads / 32];
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[threadIdx.x % 32];
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
  }
};

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
    return takes_part(i) ? given.grad_loss[i] : 0.f;
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
