// The two-way log-sum-exps of pairs_cuda.h: forward by one product for both directions; backward by a symmetric
// pass for the queries and one for the keys, each of two products. A pass that computed both gradients from one
// recomputed product would save a fifth of the products and write a partial gradient of d numbers for every
// block of rows and column: more traffic than the product costs.
#include "finish_backward_cuda.cuh"
#include "logsumexp_both_cuda.cuh"
#include "pairs_cuda.cuh"

namespace wscl::cuda {
namespace {

// One direction's results, in the order of the pass.
struct FinishSide {
  SoftmaxParts from;  // one part; none: nothing is met
  const int64_t* order;
  int64_t count;
  float* lse;
  double* stats;
};

__global__ void finish_side(const FinishSide f, const Meeting meeting, const bool keys) {
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= f.count) return;
  const int64_t i = f.order ? f.order[position] : position;
  const InfoNCEProblem& p = meeting.problem.pairs;
  const int64_t* ids = keys ? p.key_clusters : p.query_clusters;
  const bool ignored = ids && ids[i] == p.ignore_index;
  const double shift = f.from.splits && !ignored ? f.from.shift[position] : -INFINITY;
  const double sum = f.from.splits && !ignored ? f.from.sum[position] : 0;
  const bool meets = sum != 0;
  f.lse[i] = meets ? static_cast<float>((shift + log2(sum)) * 0.6931471805599453) : -INFINITY;
  f.stats[i] = meets ? shift : -INFINITY;
  f.stats[f.count + i] = meets ? sum : 0;
}

cudaError_t launch_finish(const FinishSide& side, const Meeting& meeting, bool keys, cudaStream_t stream) {
  if (side.count) finish_side<<<blocks_for(side.count), kBlock, 0, stream>>>(side, meeting, keys);
  return cudaGetLastError();
}

// What each side of a gradient starts from.
struct Side {
  const float* grad;
  const double* stats;  // [2, count]
  int64_t count;

  __device__ __forceinline__ double sum(int64_t i) const {
    return stats[count + i];
  }
};

struct TwoWay {
  Meeting meeting;
  Side rows, columns;
  GradientScalars* scalars;
};

struct SideValues {
  TwoWay both;
  bool keys;

  __device__ __forceinline__ ColumnValues operator()(int64_t i) const {
    const Side& side = keys ? both.columns : both.rows;
    ColumnValues x;
    if (!keys) x = QueryColumn{both.meeting}(i);
    const double sum = side.sum(i);
    const bool one = both.scalars->shifts[0] == Shifts::kOne;
    if (one) x.shift = both.scalars->shift[0];
    if (sum != 0) {
      if (!one) x.shift = static_cast<float>(side.stats[i]);
      x.weight = static_cast<float>(side.grad[i] / sum * (one ? exp2(x.shift - side.stats[i]) : 1.) *
                                    both.scalars->boost);
    }
    return x;
  }
};

// Rows, then columns.
struct AddEither {
  Side rows, columns;

  __device__ __forceinline__ void operator()(int64_t i, int, Extremes& to) const {
    const Side& side = i < rows.count ? rows : columns;
    if (i >= rows.count) i -= rows.count;
    const double sum = side.sum(i);
    if (sum != 0) to.add(side.grad[i], static_cast<float>(side.stats[i]) + __log2f(static_cast<float>(sum)));
  }
};

struct FinishGradient {
  SoftmaxParts parts;
  const int64_t* order;
  int64_t first, d, width;
  const float* scale;
  const GradientScalars* scalars;
  const double* sum;  // by row; 0: it meets nothing
  float* to;
};

// A warp for each row.
__global__ void finish_gradient(const FinishGradient f) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= f.parts.rows) return;
  const int64_t i = f.order ? f.order[f.first + row] : f.first + row;
  const float alpha = *f.scale / f.scalars->boost;
  const bool meets = f.sum[i] != 0;
  for (int64_t c0 = lane * 4; c0 < f.d; c0 += 128) {
    const float4 x = total(f.parts, row, f.width, c0);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (c0 + e < f.d) f.to[i * f.d + c0 + e] = meets ? alpha * at(x, e) : 0.f;
  }
}

cudaError_t side_gradient(SimilarityParams pass, SoftmaxParts parts, int64_t rows, FinishGradient finish,
                          cudaStream_t stream) {
  const int64_t chunk = parts.rows;
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < rows && !error; first += chunk) {
    finish.first = first;
    finish.parts = parts.first(std::min(chunk, rows - first));
    error = run_similarity(rows_from(pass, first, finish.parts.rows), stream);
    if (error) break;
    finish_gradient<<<blocks_for(finish.parts.rows, kBlock / 32), kBlock, 0, stream>>>(finish);
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace

cudaError_t two_way_forward(const PairsProblem& problem, TwoWayForward& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  const GradientVectors queries(p.n, space);
  SimilarityParams pass = meeting.by_queries(Epilogue::kBoth);
  pass.x_valid = p.query_clusters ? queries.valid : nullptr;
  const LogSumExpBoth both(pass, meeting.by_keys(Epilogue::kSoftmax, queries), space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace) return cudaSuccess;
  FinishSide rows = {both.rows, meeting.query_order(), p.n, to.row_lse, to.row_stats};
  FinishSide columns = {both.columns, meeting.key_order(), p.m, to.column_lse, to.column_stats};
  cudaError_t error = cudaSuccess;
  if (p.n == 0 || p.m == 0) {
    rows.from = columns.from = {};
  } else {
    error = meeting.find(stream);
    if (!error) error = fill(queries, p.n, meeting.query_order(), QueryColumn{meeting}, stream);
    if (!error) error = both.run(stream);
  }
  if (!error) error = launch_finish(rows, meeting, false, stream);
  if (!error) error = launch_finish(columns, meeting, true, stream);
  return error;
}

cudaError_t two_way_backward(const PairsProblem& problem, TwoWayBackward& to, cudaStream_t stream) {
  const InfoNCEProblem& p = problem.pairs;
  Workspace space(to.workspace);
  const Meeting meeting(problem, space);
  const TwoWay both = {meeting,
                       {to.grad_rows, to.row_stats, p.n},
                       {to.grad_columns, to.column_stats, p.m},
                       space.take<GradientScalars>(1)};
  const GradientVectors queries(p.n, space), keys(p.m, space);
  const auto with_sides = [&](SimilarityParams pass, const GradientVectors& rows,
                              const GradientVectors& columns) {
    pass.row_shift = rows.shift;
    pass.row_weight = rows.weight;
    pass.column_shift = columns.shift;
    pass.column_weight = columns.weight;
    pass.shifts = &both.scalars->shifts[0];
    return pass;
  };
  SimilarityParams by_queries = with_sides(meeting.by_queries(Epilogue::kSymmetric), queries, keys);
  SimilarityParams by_keys = with_sides(meeting.by_keys(Epilogue::kSymmetric, queries), keys, queries);
  by_queries.x.count = row_chunk(p.n, p.d);
  by_keys.x.count = row_chunk(p.m, p.d);
  SoftmaxParts query_parts = {}, key_parts = {};
  if (to.need_queries) query_parts = take_parts(by_queries, true, space);
  if (to.need_keys) key_parts = take_parts(by_keys, true, space);
  to.workspace_bytes = space.bytes();
  if (!to.workspace) return cudaSuccess;

  cudaError_t error = meeting.find(stream);
  if (error) return error;
  error = find_scalars(p.precision, 1, p.n + p.m, AddEither{both.rows, both.columns}, both.scalars, stream);
  if (!error) error = fill(queries, p.n, meeting.query_order(), SideValues{both, false}, stream);
  if (!error) error = fill(keys, p.m, meeting.key_order(), SideValues{both, true}, stream);
  const FinishGradient finish = {{},      nullptr,      0,       p.d,    by_queries.output_stride,
                                 p.scale, both.scalars, nullptr, nullptr};
  if (!error && to.need_queries) {
    FinishGradient of = finish;
    of.order = meeting.query_order();
    of.sum = to.row_stats + p.n;
    of.to = to.grad_queries;
    error = side_gradient(by_queries, query_parts, p.n, of, stream);
  }
  if (!error && to.need_keys) {
    FinishGradient of = finish;
    of.order = meeting.key_order();
    of.sum = to.column_stats + p.m;
    of.to = to.grad_keys;
    error = side_gradient(by_keys, key_parts, p.m, of, stream);
  }
  return error;
}

}  // namespace wscl::cuda
