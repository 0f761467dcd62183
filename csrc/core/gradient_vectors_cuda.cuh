// What the backward passes say of every query: shift, weight, and which key it does not meet.
#pragma once

#include "infonce_passes_cuda.cuh"

namespace wscl::cuda {

// Numbers that are found on the device and stay there.
struct GradientScalars {
  float boost;           // a power of two that keeps float16 weights in the normal range; 1 elsewhere
  int32_t one_shift[2];  // for all pairs and for the positives: whether one shift serves all rows
  float shift[2];        // and which
};

struct GradientVectors {
  int64_t padded;          // queries, rounded up to whole words of valid bits
  float *shift, *weight;   // [padded]
  int32_t* excluded;       // [padded] the row of the key that a query does not meet, or −1
  float* excluded_weight;  // [padded] what its pair weighs instead
  int2* excluded_range;    // [padded / 64]
  uint64_t* valid;         // [padded / 64]

  GradientVectors() = default;
  GradientVectors(const InfoNCEProblem& p, Workspace& space);
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

// kSecond: of the second pass of "in", in query_order; kOrdered: of the first, in query_order. `share` is
// written by kFirst.
enum class Vectors : int { kFirst, kSecond, kOrdered };
cudaError_t find_scalars(const Upstream& up, cudaStream_t stream);
cudaError_t find_vectors(const Upstream& up, const GradientVectors& vectors, Vectors which,
                         cudaStream_t stream);

}  // namespace wscl::cuda
