// What the forward and the backward pass of infonce_cuda.h share.
#pragma once

#include <algorithm>

#include "clusters_cuda.cuh"

namespace wscl::cuda {

inline Rows query_rows(const InfoNCEProblem& p) {
  return {p.queries, p.query_stride, nullptr, p.n};
}
inline Rows key_rows(const InfoNCEProblem& p) {
  return {p.keys, p.key_stride, nullptr, p.m};
}
inline bool has_excluded(const InfoNCEProblem& p) {
  return p.self ? p.exclude_self : p.own != nullptr;
}

inline SimilarityParams base_pass(const InfoNCEProblem& p) {
  SimilarityParams pass;
  pass.precision = p.precision;
  pass.d = p.d;
  pass.scale = p.scale;
  pass.output_stride = padded_width(p.d);
  return pass;
}

// What a pass leaves behind, part by part.
struct SoftmaxParts {
  int splits;
  int64_t rows;
  float *shift, *sum, *output;
};

// Sets the pass's split and outputs.
inline SoftmaxParts take_parts(SimilarityParams& pass, bool output, Workspace& space) {
  pass.splits = choose_splits(pass);
  const int64_t rows = pass.splits * pass.x.count;
  if (pass.epilogue == Epilogue::kSoftmax) {
    pass.shift = space.take<float>(rows);
    pass.sum = space.take<float>(rows);
  }
  if (pass.epilogue == Epilogue::kSigmoid) {
    pass.sum = space.take<float>(rows);
    pass.slope = space.take<float>(rows);
  }
  if (output) pass.output = space.take<float>(rows * pass.output_stride);
  return {pass.splits, pass.x.count, pass.shift, pass.sum, pass.output};
}

// A row's parts as one: shift, sum, and each part's factor.
struct Merged {
  double shift = -INFINITY, sum = 0;

  __device__ Merged(const SoftmaxParts& parts, int64_t row) {
    for (int s = 0; s < parts.splits; ++s)
      shift = fmax(shift, static_cast<double>(parts.shift[s * parts.rows + row]));
    for (int s = 0; s < parts.splits; ++s) sum += factor(parts, row, s) * parts.sum[s * parts.rows + row];
  }
  // Exactly a power of two; NaN only where a shift is.
  __device__ double factor(const SoftmaxParts& parts, int64_t row, int split) const {
    const double part = parts.shift[split * parts.rows + row];
    return part == -INFINITY ? 0 : exp2(part - shift);
  }
  __device__ double log_sum_exp() const {
    return (shift + log2(sum)) * 0.6931471805599453;
  }
  __device__ float mean(const SoftmaxParts& parts, int64_t row, int64_t width, int64_t column) const {
    float total = 0;
    for (int s = 0; s < parts.splits; ++s)
      total +=
          static_cast<float>(factor(parts, row, s)) * parts.output[(s * parts.rows + row) * width + column];
    return sum == 0 ? 0.f : static_cast<float>(total / sum);
  }
};

// Queries and keys in the order of their ids, so that a row's positives are one range of columns.
struct MatchedRanges {
  int32_t* key_begin;  // [n] by position in query_order
  int32_t* key_end;
  int32_t* own;             // [n] the position in key_order of the key that the query does not meet, or −1
  int32_t* query_begin;     // [m] by position in key_order
  int32_t* query_end;       // [m]
  uint64_t* key_valid;      // [m bits] by position in key_order: keys that have a cluster
  int32_t* key_position;    // [m] where a key lies in key_order
  int32_t* query_position;  // [n]

  MatchedRanges() = default;
  MatchedRanges(const InfoNCEProblem& p, Workspace& space);
  cudaError_t find(const InfoNCEProblem& p, const Clusters& clusters, cudaStream_t stream) const;
};

}  // namespace wscl::cuda
