// What the forward and the backward pass of infonce.h share: the problem with its clusters found.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "clusters.h"
#include "infonce.h"
#include "similarity.h"

namespace wscl {

inline constexpr int64_t kRowGrain = 64;

// The problem with its clusters found.
template <class In>
struct Prepared {
  const InfoNCEProblem<In>& problem;
  bool self;  // the queries are the keys
  Segments segments;
  OwnKeys own;

  Prepared(const InfoNCEProblem<In>& p, const Threads& threads)
      : problem(p),
        self(!p.keys),
        segments(find_segments(p.query_clusters, p.n, p.key_clusters, p.m, !p.keys, p.ignore_index, threads)) {
    own.own = self ? nullptr : p.own;
    own.diagonal = self && p.exclude_self;
    own.m = p.m;
  }

  bool excludes_positive(int64_t i) const {
    const int64_t j = own.of(i);
    return j >= 0 && segments.keys()[j] == segments.of_query[i];
  }

  void count_positives(int64_t* count) const {
    std::vector<int64_t> members(segments.count, 0);
    for (int64_t s : segments.keys())
      if (s >= 0) ++members[s];
    for (int64_t i = 0; i < problem.n; ++i) {
      const int64_t s = segments.of_query[i];
      count[i] = s < 0 ? 0 : members[s] - excludes_positive(i);
    }
  }

  // The pairs of a pass over all keys, or over each query's own cluster. A query without a positive takes no
  // part; but where the queries are the keys it still is the others' negative, and its log-sum-exp bounds
  // their logits.
  Meeting meeting(Meets meets, const int64_t* count, bool keys_are_rows) const {
    return meet(meets, segments, own, self ? nullptr : count, keys_are_rows);
  }

  Rows<In> query_rows() const {
    return {problem.queries, problem.query_stride, nullptr, problem.n};
  }

  Rows<In> key_rows() const {
    return self ? query_rows() : Rows<In>{problem.keys, problem.key_stride, nullptr, problem.m};
  }
};

// What a pass found of its rows, to where they stand in the problem.
inline void to_rows(const std::vector<int64_t>& order, const std::vector<double>& found, double* to) {
  for (size_t q = 0; q < order.size(); ++q) to[order[q]] = found[q];
}

template <class In>
SimilarityParams<In> base_pass(const InfoNCEProblem<In>& p) {
  SimilarityParams<In> pass;
  pass.d = p.d;
  pass.scale = static_cast<Compute<In>>(p.scale * kLog2E);
  return pass;
}

// In double, in several sums: one alone would wait for every addition.
template <class A, class B>
double dot(const A* a, const B* b, int64_t d) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= d; c += kSums)
    for (int64_t s = 0; s < kSums; ++s)
      sums[s] += static_cast<double>(to_compute(a[c + s])) * to_compute(b[c + s]);
  for (; c < d; ++c) sums[0] += static_cast<double>(to_compute(a[c])) * to_compute(b[c]);
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// The logit of a query with itself, base 2.
template <class In>
double own_logit(const InfoNCEProblem<In>& p, int64_t i) {
  const In* x = p.queries + i * p.query_stride;
  return p.scale * kLog2E * dot(x, x, p.d);
}

}  // namespace wscl
