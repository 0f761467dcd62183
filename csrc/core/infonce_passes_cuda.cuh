// What the forward and the backward pass of infonce_cuda.h share.
#pragma once

#include <algorithm>

#include "clusters_cuda.cuh"
#include "mma.cuh"

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
  int64_t rows, whole_rows;
  float *shift, *sum, *output;

  __device__ __forceinline__ int count(int64_t row) const {
    return row < whole_rows ? 1 : splits;
  }
  __device__ __forceinline__ int64_t place(int part, int64_t row) const {
    return part_place(part, row, rows, whole_rows);
  }
  // Of the first `count` rows.
  SoftmaxParts first(int64_t count) const {
    SoftmaxParts parts = *this;
    parts.rows = count;
    parts.whole_rows = std::min(whole_rows, count);
    return parts;
  }
};

// Sets the pass's split and outputs.
inline SoftmaxParts take_parts(SimilarityParams& pass, bool output, Workspace& space) {
  const Split split = choose_split(pass, output);
  pass.splits = split.splits;
  pass.whole_rows = split.whole_rows;
  const int64_t rows = part_place(pass.splits, 0, pass.x.count, pass.whole_rows) + pass.whole_rows;
  if (pass.epilogue == Epilogue::kSoftmax) {
    pass.shift = space.take<float>(rows);
    pass.sum = space.take<float>(rows);
  }
  if (pass.epilogue == Epilogue::kSigmoid) {
    pass.sum = space.take<float>(rows);
    pass.slope = space.take<float>(rows);
  }
  if (output) pass.output = space.take<float>(rows * pass.output_stride);
  return {pass.splits, pass.x.count, pass.whole_rows, pass.shift, pass.sum, pass.output};
}

// Four neighbouring numbers of a row: the sum over a pass's parts, each by its factor.
template <class Factor>
__device__ __forceinline__ float4 add_parts_of_row(const SoftmaxParts& parts, int64_t row, int64_t width,
                                                   int64_t column, const Factor& factor) {
  float4 total = {};
  for (int s = 0; s < parts.count(row); ++s) {
    const float4 x = *reinterpret_cast<const float4*>(parts.output + parts.place(s, row) * width + column);
    const float f = factor(s);
    total.x = fmaf(f, x.x, total.x);
    total.y = fmaf(f, x.y, total.y);
    total.z = fmaf(f, x.z, total.z);
    total.w = fmaf(f, x.w, total.w);
  }
  return total;
}

// A row's parts as one: shift, sum, and each part's factor.
struct Merged {
  double shift = -INFINITY, sum = 0;

  __device__ Merged(const SoftmaxParts& parts, int64_t row) {
    float largest = -INFINITY;
    for (int s = 0; s < parts.count(row); ++s) largest = fmaxf(largest, parts.shift[parts.place(s, row)]);
    shift = largest;
    for (int s = 0; s < parts.count(row); ++s)
      sum += static_cast<double>(factor(parts, row, s)) * parts.sum[parts.place(s, row)];
  }
  // Shifts are integers: exactly a power of two, and 0 below the normal range.
  __device__ __forceinline__ float factor(const SoftmaxParts& parts, int64_t row, int split) const {
    const float part = parts.shift[parts.place(split, row)];
    return part == -INFINITY ? 0.f : power_of_two(part - static_cast<float>(shift));
  }
  __device__ double log_sum_exp() const {
    return (shift + log2(sum)) * 0.6931471805599453;
  }
  // Four neighbouring numbers of the softmax-weighted mean.
  __device__ __forceinline__ float4 mean(const SoftmaxParts& parts, int64_t row, int64_t width,
                                         int64_t column) const {
    float4 x = add_parts_of_row(parts, row, width, column, [&](int s) { return factor(parts, row, s); });
    const float inverse = sum == 0 ? 0.f : static_cast<float>(1 / sum);
    x.x *= inverse;
    x.y *= inverse;
    x.z *= inverse;
    x.w *= inverse;
    return x;
  }
};

__device__ __forceinline__ float at(const float4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

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
