// Sums over keys weighed by the tags that they share with a query, on a CUDA device: tag_weighted_sum of
// tags.h. No torch, no Python; everything is enqueued on one stream, nothing waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace wscl::cuda {

struct TagProblem {
  const int64_t* row_tags = nullptr;     // [n, words]
  const int64_t* column_tags = nullptr;  // [m, words]
  const float* values = nullptr;         // [m, d], unit column stride
  int64_t n = 0, m = 0, words = 0, value_stride = 0, d = 0;
  bool jaccard = false;  // weights are |a ∩ b| / |a ∪ b|; else 1 where a ∩ b is not empty
};

// Only bytes are counted, and nothing is enqueued, where `workspace` is null: pass that many the next time.
struct TagSums {
  float* sums = nullptr;     // [n, d]
  double* totals = nullptr;  // [n]
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t tag_weighted_sum(const TagProblem& problem, TagSums& outputs, cudaStream_t stream);

}  // namespace wscl::cuda
