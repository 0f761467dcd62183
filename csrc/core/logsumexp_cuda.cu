// The log-sum-exps of pairs_cuda.h, forward and backward.
#include "finish_backward_cuda.cuh"
#include "pairs_cuda.cuh"

namespace wscl::cuda {
namespace {

struct FinishLogSumExp {
  InfoNCEProblem problem;
  LogSumExpForward to;
  Clusters clusters;
  SoftmaxParts parts;
  int64_t width;
};

// A warp for each row, in the order of the pass.
__global__ void finish_logsumexp(const FinishLogSumExp f) {
  const InfoNCEProblem& p = f.problem;
  const int64_t position = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (position >= p.n) return;
  const int64_t i = p.inner ? p.query_order[position] : position;
  const Merged merged(f.parts, position);
  const bool meets = f.clusters.query_segment[i] >= 0 && merged.sum != 0;
  if (f.to.mean)
    for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
      float4 x = {};
      if (meets) x = merged.mean(f.parts, position, f.width, c0);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c0 + e < p.d) f.to.mean[i * p.d + c0 + e] = at(x, e);
    }
  if (lane) return;
  f.to.lse[i] = meets ? static_cast<float>(merged.log_sum_exp()) : -INFINITY;
  f.to.stats[i] = meets ? merged.shift : -INFINITY;
  f.to.stats[p.n + i] = meets ? merged.sum : 0;
}

__global__ void fill_nothing(const LogSumExpForward to, int64_t n, int64_t d) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (to.mean && at < n * d) to.mean[at] = 0;
  if (at >= n) return;
  to.lse[at] = to.stats[at] = -INFINITY;
  to.stats[n + at] = 0;
}

}  // namespace

cudaError_t logsumexp_forward(const PairsProblem& problem, LogSumExpForward& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  SimilarityParams pass = meeting.by_queries(Epilogue::kSoftmax);
  const SoftmaxParts parts = take_parts(pass, to.need_mean, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.n == 0) return cudaSuccess;
  if (p.m == 0) {
    fill_nothing<<<blocks_for(p.n * std::max<int64_t>(1, to.mean ? p.d : 1)), kBlock, 0, stream>>>(to, p.n,
                                                                                                   p.d);
    return cudaGetLastError();
  }
  cudaError_t error = meeting.find(stream);
  if (!error) error = run_similarity(pass, stream);
  if (error) return error;
  const FinishLogSumExp finish = {p, to, meeting.clusters, parts, pass.output_stride};
  finish_logsumexp<<<blocks_for(p.n, kBlock / 32), kBlock, 0, stream>>>(finish);
  return cudaGetLastError();
}

cudaError_t logsumexp_key_gradient(const PairsProblem& problem, LogSumExpKeyGradient& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  InfoNCEBackward given;
  given.grad_loss = to.grad;
  given.stats = to.stats;
  given.grad_keys = to.grad_keys;
  const Upstream up = {p, given, meeting.clusters, meeting.ranges, space.take<GradientScalars>(1), nullptr};
  const GradientVectors vectors(p.n, space);
  SimilarityParams by_keys = meeting.by_keys(Epilogue::kColumns, vectors);
  by_keys.shifts = &up.scalars->shifts[0];
  const KeyPass keys(by_keys, p, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.m == 0) return cudaSuccess;
  cudaError_t error = meeting.find(stream);
  if (!error) error = find_scalars(up, stream);
  if (!error) error = find_vectors(up, vectors, p.inner ? Vectors::kOrdered : Vectors::kFirst, stream);
  return error ? error : keys.run(up, stream);
}

}  // namespace wscl::cuda
