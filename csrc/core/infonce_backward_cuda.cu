// The backward pass of infonce_cuda.h: the keys' gradient from a transposed pass, or everything from a
// symmetric one where the queries are the keys; what is linear in N + M is done where results are written.
#include "finish_backward_cuda.cuh"

namespace wscl::cuda {
namespace {

// grad_queries = g · scale · direction. A warp for each row, as below.
template <class In>
__global__ void finish_queries(const FinishBackward f) {
  const InfoNCEProblem& p = f.up.problem;
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (i >= p.n) return;
  const float gradient = f.up.gradient(i), factor = gradient * *p.scale;
  const float* direction = f.up.given.direction + i * p.d;
  double dot = 0;
  for (int64_t c = lane; c < p.d; c += 32) {
    if (f.up.given.grad_queries)
      store_float(static_cast<In*>(f.up.given.grad_queries) + i * p.d + c, factor * direction[c]);
    dot +=
        static_cast<double>(to_float(static_cast<const In*>(p.queries)[i * p.query_stride + c])) * direction[c];
  }
  dot = warp_sum(dot);
  if (lane == 0) f.row_dot[i] = gradient == 0 ? 0 : gradient * dot;  // whatever stands in a row without an id
}

// grad_x_i = scale · (Σ_j (g_i p_ij + g_j p_ji) x_j − share_i Σ_{j ∈ P(i)} x_j − Σ_{j: i ∈ P(j)} share_j x_j).
template <class In>
__global__ void finish_self(const FinishBackward f) {
  const InfoNCEProblem& p = f.up.problem;
  const int64_t position = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (position >= p.n) return;
  const int64_t i = p.inner ? p.query_order[position] : position;
  const int64_t segment = f.up.clusters.query_segment[i];
  const float scale = *p.scale, alpha = scale / f.up.scalars->boost, share = p.inner ? 0.f : f.up.share[i];
  const float less = p.exclude_self ? 2 * share : 0.f;
  double dot = 0;
  for (int64_t c0 = lane * 4; c0 < p.d; c0 += 128) {
    const float4 all = total(f.all, i, f.width, c0), positives = total(f.positives, position, f.width, c0);
    float product = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t c = c0 + e;
      if (c >= p.d) break;
      const float x = to_float(static_cast<const In*>(p.queries)[i * p.query_stride + c]);
      float y = 0;
      if (segment >= 0) {
        y = alpha * (at(all, e) - at(positives, e));
        if (!p.inner)
          y -= scale * (share * f.sums[segment * f.width + c] + f.pull[segment * f.width + c] - less * x);
      }
      if (f.up.given.grad_queries) store_float(static_cast<In*>(f.up.given.grad_queries) + i * p.d + c, y);
      product = fmaf(x, y, product);
    }
    dot += product;
  }
  dot = warp_sum(dot);
  // Every logit has two rows of x in it.
  if (lane == 0) f.row_dot[i] = segment >= 0 ? dot / (2. * scale) : 0;
}

// One CTA, so that the order of the sum is fixed.
__global__ void __launch_bounds__(1024) add_dots(const double* dots, int64_t count, float* to) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += dots[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *to = static_cast<float>(sum);
}

struct Pieces {
  Workspace space;
  Clusters clusters;
  MatchedRanges ranges = {};
  Upstream up;
  GradientVectors vectors, positive_vectors = {};
  double* row_dot;

  Pieces(const InfoNCEProblem& p, const InfoNCEBackward& to)
      : space(to.workspace), clusters(to.clusters ? *to.clusters : Clusters(p, space)) {
    if (p.inner) ranges = MatchedRanges(p, space);
    up = {p, to, clusters, ranges, space.take<GradientScalars>(1), space.take<float>(p.n)};
    vectors = GradientVectors(p.n, space);
    if (p.inner) positive_vectors = GradientVectors(p.n, space);
    row_dot = space.take<double>(p.n);
  }

  cudaError_t find(const InfoNCEProblem& p, cudaStream_t stream) const {
    cudaError_t error = up.given.clusters ? cudaSuccess : clusters.find(p, stream);
    if (!error && p.inner) error = ranges.find(p, clusters, stream);
    if (!error) error = find_scalars(up, stream);
    if (!error) error = find_vectors(up, vectors, Vectors::kFirst, stream);
    if (!error && p.inner) error = find_vectors(up, positive_vectors, Vectors::kSecond, stream);
    return error;
  }
};

cudaError_t key_backward(const InfoNCEProblem& p, InfoNCEBackward& to, Pieces& pieces, cudaStream_t stream) {
  Workspace& space = pieces.space;
  SimilarityParams pass = base_pass(p), inner_pass = base_pass(p);
  const int64_t chunk = row_chunk(p.m, p.d);
  pass.epilogue = inner_pass.epilogue = Epilogue::kColumns;
  pass.x = key_rows(p);
  pass.x.count = chunk;
  pass.y = query_rows(p);
  pieces.vectors.set_columns(pass, has_excluded(p), !p.inner);
  pass.shifts = &pieces.up.scalars->shifts[0];
  SoftmaxParts all = take_parts(pass, true, space), positives = {};
  if (p.inner) {
    inner_pass.x = pass.x;
    inner_pass.y = pass.y;
    inner_pass.y.index = p.query_order;
    pieces.positive_vectors.set_columns(inner_pass, has_excluded(p), false);
    inner_pass.shifts = &pieces.up.scalars->shifts[1];
    positives = take_parts(inner_pass, true, space);
  }
  const SegmentSums pull(p.inner ? 0 : p.n, p.inner ? 0 : p.n, p.d, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.m == 0) return cudaSuccess;

  cudaError_t error = pieces.find(p, stream);
  const Clusters& c = pieces.clusters;
  if (!error && !p.inner)
    error = pull.run(p, query_rows(p), p.query_order, c.query_segment, pieces.up.share, c.query_begin,
                     c.query_end, stream);
  for (int64_t first = 0; first < p.m && !error; first += chunk) {
    const auto take_chunk = [&](SimilarityParams& of, SoftmaxParts& parts) {
      parts = parts.first(std::min(chunk, p.m - first));
      of.x_origin = first;
      of.x.count = parts.rows;
      of.whole_rows = parts.whole_rows;
      if (p.inner)
        of.x.index = p.key_order + first;
      else
        of.x.data = static_cast<const char*>(p.keys) + first * p.key_stride * element_size(p.precision);
    };
    take_chunk(pass, all);
    error = run_similarity(pass, stream);
    if (p.inner && !error) {
      take_chunk(inner_pass, positives);
      inner_pass.begin = pieces.ranges.query_begin + first;
      inner_pass.end = pieces.ranges.query_end + first;
      error = run_similarity(inner_pass, stream);
    }
    if (error) break;
    const FinishBackward finish = {pieces.up, all,       positives, pass.output_stride,
                                   nullptr,   pull.sums, nullptr,   first};
    WSCL_LAUNCH_ROWS(finish_keys, all.rows, finish);
    error = cudaGetLastError();
  }
  return error;
}

cudaError_t self_backward(const InfoNCEProblem& p, InfoNCEBackward& to, Pieces& pieces, cudaStream_t stream) {
  Workspace& space = pieces.space;
  SimilarityParams pass = base_pass(p), inner_pass = base_pass(p);
  pass.epilogue = inner_pass.epilogue = Epilogue::kSymmetric;
  pass.x = pass.y = query_rows(p);
  pieces.vectors.set_columns(pass, false, false);
  pass.row_shift = pieces.vectors.shift;
  pass.row_weight = pieces.vectors.weight;
  pass.row_excluded = has_excluded(p) ? pieces.clusters.own : nullptr;
  pass.shifts = &pieces.up.scalars->shifts[0];
  const SoftmaxParts all = take_parts(pass, true, space);
  SoftmaxParts positives = {};
  if (p.inner) {
    inner_pass.x = inner_pass.y = query_rows(p);
    inner_pass.x.index = inner_pass.y.index = p.query_order;
    pieces.positive_vectors.set_columns(inner_pass, false, false);
    inner_pass.row_shift = pieces.positive_vectors.shift;
    inner_pass.row_weight = pieces.positive_vectors.weight;
    inner_pass.row_excluded = has_excluded(p) ? pieces.ranges.own : nullptr;
    inner_pass.shifts = &pieces.up.scalars->shifts[1];
    inner_pass.begin = pieces.ranges.key_begin;
    inner_pass.end = pieces.ranges.key_end;
    positives = take_parts(inner_pass, true, space);
  }
  const int64_t rows = p.inner ? 0 : p.n;
  const SegmentSums sums(rows, rows, p.d, space), pull(rows, rows, p.d, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.n == 0) return cudaSuccess;

  cudaError_t error = pieces.find(p, stream);
  const Clusters& c = pieces.clusters;
  if (!error) error = run_similarity(pass, stream);
  if (p.inner) {
    if (!error) error = run_similarity(inner_pass, stream);
  } else {
    if (!error)
      error = sums.run(p, query_rows(p), p.query_order, c.query_segment, nullptr, c.query_begin, c.query_end,
                       stream);
    if (!error)
      error = pull.run(p, query_rows(p), p.query_order, c.query_segment, pieces.up.share, c.query_begin,
                       c.query_end, stream);
  }
  if (error) return error;
  const FinishBackward finish = {pieces.up, all,       positives,      pass.output_stride,
                                 sums.sums, pull.sums, pieces.row_dot, 0};
  WSCL_LAUNCH_ROWS(finish_self, p.n, finish);
  return cudaGetLastError();
}

}  // namespace

cudaError_t infonce_backward(const InfoNCEProblem& p, InfoNCEBackward& to, cudaStream_t stream) {
  Pieces pieces(p, to);
  to.workspace_bytes = pieces.space.bytes();
  cudaError_t error = cudaSuccess;
  if (p.self) {
    error = self_backward(p, to, pieces, stream);
  } else {
    if (to.need_keys) error = key_backward(p, to, pieces, stream);
    if (!error && to.workspace && p.n && (to.need_queries || to.need_scale)) {
      const FinishBackward finish = {pieces.up, {}, {}, 0, nullptr, nullptr, pieces.row_dot, 0};
      WSCL_LAUNCH_ROWS(finish_queries, p.n, finish);
      error = cudaGetLastError();
    }
  }
  if (error || !to.workspace || !to.need_scale) return error;
  add_dots<<<1, 1024, 0, stream>>>(pieces.row_dot, p.n, to.grad_scale);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
