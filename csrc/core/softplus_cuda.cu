// The sums of softplus of pairs_cuda.h, forward and backward.
#include "finish_backward_cuda.cuh"
#include "pairs_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// Rows' or columns' offset in base 2 and, with a gradient, their weight.
struct OffsetValues {
  Meeting meeting;
  const float *offset, *grad;
  const GradientScalars* scalars;

  __device__ __forceinline__ ColumnValues operator()(int64_t i) const {
    ColumnValues x = QueryColumn{meeting}(i);
    x.shift = offset[i] * kLog2E;
    if (grad && x.valid) x.weight = grad[i] * scalars->boost;
    return x;
  }
};

struct AddGradient {
  const float* grad;

  __device__ __forceinline__ void operator()(int64_t i, int, Extremes& to) const {
    to.add(grad[i], 0);
  }
};

struct FinishSoftplus {
  InfoNCEProblem problem;
  SoftplusForward to;
  Clusters clusters;
  SoftmaxParts parts;  // none where there is no column
  const float* slope;
  int64_t width;
};

// A warp for each row, in the order of the pass.
__global__ void finish_softplus(const FinishSoftplus f, const float boost) {
  const InfoNCEProblem& p = f.problem;
  const int64_t position = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (position >= p.n) return;
  const int64_t i = p.inner ? p.query_order[position] : position;
  const SoftmaxParts parts = f.clusters.query_segment[i] >= 0 ? f.parts : SoftmaxParts{};
  if (f.to.direction)
    for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
      const float4 x = total(parts, position, f.width, c0);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c0 + e < p.d) f.to.direction[i * p.d + c0 + e] = at(x, e) / boost;
    }
  if (lane) return;
  double sum = 0, slope = 0;
  for (int s = 0; s < parts.count(position); ++s) {
    sum += parts.sum[parts.place(s, position)];
    slope += f.slope[parts.place(s, position)];
  }
  f.to.sum[i] = static_cast<float>(sum);
  f.to.slope[i] = static_cast<float>(slope);
}

}  // namespace

cudaError_t softplus_forward(const PairsProblem& problem, SoftplusForward& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  const GradientVectors offsets(p.n, space);
  SimilarityParams pass = meeting.by_queries(Epilogue::kSigmoid);
  pass.row_shift = offsets.shift;
  const SoftmaxParts parts = take_parts(pass, to.need_direction, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.n == 0) return cudaSuccess;
  cudaError_t error = meeting.find(stream);
  if (!error)
    error =
        fill(offsets, p.n, meeting.query_order(), OffsetValues{meeting, to.offset, nullptr, nullptr}, stream);
  if (!error && p.m) error = run_similarity(pass, stream);
  if (error) return error;
  const FinishSoftplus finish = {
      p, to, meeting.clusters, p.m ? parts : SoftmaxParts{}, pass.slope, pass.output_stride};
  finish_softplus<<<blocks_for(p.n, kBlock / 32), kBlock, 0, stream>>>(finish, sigmoid_boost(p.precision));
  return cudaGetLastError();
}

cudaError_t softplus_key_gradient(const PairsProblem& problem, SoftplusKeyGradient& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  InfoNCEBackward given;
  given.grad_keys = to.grad_keys;
  const Upstream up = {p, given, meeting.clusters, meeting.ranges, space.take<GradientScalars>(1), nullptr};
  const GradientVectors vectors(p.n, space);
  const KeyPass keys(meeting.by_keys(Epilogue::kSigmoidColumns, vectors), p, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.m == 0) return cudaSuccess;
  cudaError_t error = meeting.find(stream);
  if (!error) error = find_scalars(p.precision, 1, p.n, AddGradient{to.grad}, up.scalars, stream);
  if (!error)
    error = fill(vectors, p.n, meeting.query_order(), OffsetValues{meeting, to.offset, to.grad, up.scalars},
                 stream);
  return error ? error : keys.run(up, stream);
}

}  // namespace wscl::cuda
