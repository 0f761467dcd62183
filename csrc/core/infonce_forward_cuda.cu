// The forward pass of infonce_cuda.h: a similarity pass, segment sums or a second pass over the positives, and
// a kernel that merges the parts of the passes and writes the results.
#include "clusters_cuda.cuh"
#include "logsumexp_both_cuda.cuh"

namespace wscl::cuda {
namespace {

struct FinishForward {
  InfoNCEProblem problem;
  InfoNCEForward to;
  Clusters clusters;
  SoftmaxParts all, positives;  // the second: "in", rows in query_order
  const float* sums;            // "out"
  int64_t width;
};

// A warp for each row.
template <class In>
__global__ void finish_forward(const FinishForward f) {
  const InfoNCEProblem& p = f.problem;
  const int64_t position = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (position >= p.n) return;
  const int64_t i = p.inner ? p.query_order[position] : position;
  const int64_t count = f.clusters.count[i], n = p.n;
  const bool anchor = count > 0;
  // Where the queries are the keys, one without a positive still is the others' negative.
  const bool meets = p.self ? f.clusters.query_segment[i] >= 0 : anchor;
  const Merged all(f.all, i);
  double loss = 0;
  Merged positives = all;
  if (p.inner) {
    positives = Merged(f.positives, position);
    if (anchor) loss = all.log_sum_exp() - positives.log_sum_exp() + log(static_cast<double>(count));
  }
  if (anchor && !p.inner) {
    const In* query = static_cast<const In*>(p.queries) + i * p.query_stride;
    const In* own = f.clusters.own_positive[i]
                        ? static_cast<const In*>(p.keys) + f.clusters.own[i] * p.key_stride
                        : nullptr;
    const float* sum = f.sums + int64_t(f.clusters.query_segment[i]) * f.width;
    double logit = 0;
    const float share = 1.f / static_cast<float>(count);
    for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
      float4 pooled = {};
      if (f.to.direction) pooled = all.mean(f.all, i, f.width, c0);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t c = c0 + e;
        if (c >= p.d) break;
        const float mean = (sum[c] - (own ? to_float(own[c]) : 0.f)) * share;
        logit += static_cast<double>(to_float(query[c]) * mean);
        if (f.to.direction) f.to.direction[i * p.d + c] = at(pooled, e) - mean;
      }
    }
    loss = all.log_sum_exp() - *p.scale * warp_sum(logit);
  } else if (f.to.direction) {
    for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
      float4 x = {}, y = {};
      if (anchor) {
        x = all.mean(f.all, i, f.width, c0);
        y = positives.mean(f.positives, position, f.width, c0);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c0 + e < p.d) f.to.direction[i * p.d + c0 + e] = at(x, e) - at(y, e);
    }
  }
  if (lane) return;
  f.to.loss[i] = static_cast<float>(loss);
  f.to.count[i] = count;
  f.to.stats[i] = meets ? all.shift : -INFINITY;
  f.to.stats[n + i] = meets ? all.sum : 0;
  if (p.inner) {
    f.to.stats[2 * n + i] = anchor ? positives.shift : -INFINITY;
    f.to.stats[3 * n + i] = anchor ? positives.sum : 0;
  }
}

}  // namespace

cudaError_t infonce_forward(const InfoNCEProblem& p, InfoNCEForward& to, cudaStream_t stream) {
  Workspace space(to.workspace);
  const bool output = to.need_direction && !p.self;
  const Clusters clusters = to.clusters ? *to.clusters : Clusters(p, space);

  SimilarityParams pass = base_pass(p);
  pass.x = query_rows(p);
  pass.y = key_rows(p);
  pass.y_valid = clusters.key_valid;
  pass.row_excluded = has_excluded(p) ? clusters.own : nullptr;
  // Where the queries are the keys, half of the pairs tell of the other half.
  LogSumExpBoth both;
  SoftmaxParts all;
  if (p.self) {
    pass.triangular = true;
    pass.x_valid = clusters.key_valid;
    both = LogSumExpBoth(pass, pass, space);
    all = both.rows;
  } else {
    all = take_parts(pass, output, space);
  }

  SimilarityParams inner_pass = base_pass(p);
  SoftmaxParts positives = {};
  MatchedRanges ranges = {};
  if (p.inner) {
    ranges = MatchedRanges(p, space);
    inner_pass.x = query_rows(p);
    inner_pass.x.index = p.query_order;
    inner_pass.y = key_rows(p);
    inner_pass.y.index = p.key_order;
    inner_pass.begin = ranges.key_begin;
    inner_pass.end = ranges.key_end;
    inner_pass.row_excluded = has_excluded(p) ? ranges.own : nullptr;
    positives = take_parts(inner_pass, output, space);
  }
  const SegmentSums sums(p.inner ? 0 : p.m, p.inner ? 0 : p.n, p.d, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.n == 0) return cudaSuccess;

  cudaError_t error = clusters.find(p, stream);
  if (!error) error = p.self ? both.run(stream) : run_similarity(pass, stream);
  if (p.inner) {
    if (!error) error = ranges.find(p, clusters, stream);
    if (!error) error = run_similarity(inner_pass, stream);
  } else if (!error) {
    error = sums.run(p, key_rows(p), p.key_order, clusters.key_segment, nullptr, clusters.key_begin,
                     clusters.key_end, stream);
  }
  if (error) return error;
  const FinishForward finish = {p, to, clusters, all, positives, sums.sums, sums.width};
  with_element(p.precision, [&](auto* element) {
    finish_forward<std::remove_pointer_t<decltype(element)>>
        <<<blocks_for(p.n, kBlock / 32), kBlock, 0, stream>>>(finish);
  });
  return cudaGetLastError();
}

}  // namespace wscl::cuda
