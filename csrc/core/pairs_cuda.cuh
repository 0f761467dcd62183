// Who meets whom, as the similarity pass wants it: what log-sum-exps, two-way log-sum-exps and sums of softplus
// share. Where ids decide, rows and columns go in the order of their ids, so that what a row meets is one range
// of columns or all but one: only tiles at a range's ends are masked.
#pragma once

#include "gradient_vectors_cuda.cuh"
#include "pairs_cuda.h"

namespace wscl::cuda {

struct Meeting {
  PairsProblem problem;
  Clusters clusters;
  MatchedRanges ranges = {};  // where ids decide

  Meeting(const PairsProblem& p, Workspace& space) : problem(p), clusters(p.pairs, space) {
    if (p.pairs.inner) ranges = MatchedRanges(p.pairs, space);
  }
  cudaError_t find(cudaStream_t stream) const {
    const cudaError_t error = clusters.find(problem.pairs, stream);
    return error || !problem.pairs.inner ? error : ranges.find(problem.pairs, clusters, stream);
  }

  const int64_t* query_order() const {
    return problem.pairs.inner ? problem.pairs.query_order : nullptr;
  }
  const int64_t* key_order() const {
    return problem.pairs.inner ? problem.pairs.key_order : nullptr;
  }
  const uint64_t* key_valid() const {
    return !problem.pairs.key_clusters ? nullptr : problem.pairs.inner ? ranges.key_valid : clusters.key_valid;
  }

  // Rows are queries, columns keys.
  SimilarityParams by_queries(Epilogue epilogue) const {
    const InfoNCEProblem& p = problem.pairs;
    SimilarityParams pass = base_pass(p);
    pass.epilogue = epilogue;
    pass.x = query_rows(p);
    pass.y = key_rows(p);
    pass.x.index = query_order();
    pass.y.index = key_order();
    pass.y_valid = key_valid();
    pass.row_excluded = !has_excluded(p) ? nullptr : p.inner ? ranges.own : clusters.own;
    pass.begin = ranges.key_begin;
    pass.end = ranges.key_end;
    pass.outside = problem.meets == Meets::kOther;
    return pass;
  }

  // Rows are keys, columns queries; the queries' vectors name the keys that they do not meet.
  SimilarityParams by_keys(Epilogue epilogue, const GradientVectors& queries) const {
    const InfoNCEProblem& p = problem.pairs;
    SimilarityParams pass = base_pass(p);
    pass.epilogue = epilogue;
    pass.x = key_rows(p);
    pass.y = query_rows(p);
    pass.x.index = key_order();
    pass.y.index = query_order();
    queries.set_columns(pass, has_excluded(p), false);
    pass.begin = ranges.query_begin;
    pass.end = ranges.query_end;
    pass.outside = problem.meets == Meets::kOther;
    return pass;
  }
};

// What a query is to the columns of a pass: whether it takes part, and the key that it does not meet.
struct QueryColumn {
  Meeting meeting;

  __device__ __forceinline__ ColumnValues operator()(int64_t i) const {
    ColumnValues values;
    values.valid = meeting.clusters.query_segment[i] >= 0;
    const int32_t own = meeting.clusters.own[i];
    if (values.valid && own >= 0)
      values.excluded = meeting.problem.pairs.inner ? meeting.ranges.key_position[own] : own;
    return values;
  }
};

}  // namespace wscl::cuda
