// What the forward and the backward pass of infonce.h share: the problem with its clusters found.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "clusters.h"
#include "infonce.h"
#include "similarity.h"

namespace wscl {

inline constexpr int64_t kRowGrain = 256;

// The problem with its clusters found.
template <class T>
struct Prepared {
  const InfoNCEProblem<T>& problem;
  bool self;  // the queries are the keys
  Segments segments;
  OwnKeys own;

  explicit Prepared(const InfoNCEProblem<T>& p)
      : problem(p),
        self(!p.keys),
        segments(find_segments(p.query_clusters, p.n, p.key_clusters, p.m, !p.keys, p.ignore_index)) {
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

  Rows<T> query_rows() const {
    return {problem.queries, problem.query_stride, nullptr, problem.n};
  }

  Rows<T> key_rows() const {
    return self ? query_rows() : Rows<T>{problem.keys, problem.key_stride, nullptr, problem.m};
  }
};

template <class T>
SimilarityParams<T> base_pass(const InfoNCEProblem<T>& p) {
  SimilarityParams<T> pass;
  pass.d = p.d;
  pass.scale = static_cast<T>(p.scale * kLog2E);
  return pass;
}

template <class T>
double dot(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

}  // namespace wscl
