// What the forward and the backward pass of infonce.h share: the problem with its clusters found, which rows
// take part in which order, and which pairs may not meet.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "clusters.h"
#include "infonce.h"
#include "similarity.h"

namespace wscl {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr int64_t kRowGrain = 256;

// The problem with its clusters found: which rows take part, and what each row meets.
template <class T>
struct Prepared {
  const InfoNCEProblem<T>& problem;
  bool self;  // the queries are the keys
  Segments segments;
  std::vector<int64_t> queries;       // those that take part, ascending
  std::vector<int64_t> keys;          // those that have a cluster; empty where all have one
  std::vector<int64_t> key_position;  // of each key in `keys`; empty where all have a cluster

  explicit Prepared(const InfoNCEProblem<T>& p)
      : problem(p),
        self(!p.keys),
        segments(find_segments(p.query_clusters, p.n, p.key_clusters, p.m, p.ignore_index)) {
    const std::vector<int64_t>& of_key = segments.keys();
    if (std::find(of_key.begin(), of_key.end(), kIgnored) == of_key.end()) return;
    key_position.assign(of_key.size(), -1);
    for (size_t j = 0; j < of_key.size(); ++j)
      if (of_key[j] != kIgnored) {
        key_position[j] = static_cast<int64_t>(keys.size());
        keys.push_back(static_cast<int64_t>(j));
      }
  }

  // The key that query i may not meet, or −1.
  int64_t excluded_key(int64_t i) const {
    if (self) return problem.exclude_self ? i : -1;
    if (!problem.own) return -1;
    const int64_t j = problem.own[i];
    return j >= 0 && j < problem.m && segments.of_key[j] != kIgnored ? j : -1;
  }

  bool excludes_positive(int64_t i) const {
    const int64_t j = excluded_key(i);
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

  // Queries that take part. Where they are the keys, one without a positive still is the others' negative,
  // and its log-sum-exp bounds their logits.
  void choose_queries(const int64_t* count) {
    for (int64_t i = 0; i < problem.n; ++i)
      if (self ? segments.of_query[i] != kIgnored : count[i] > 0) queries.push_back(i);
  }

  Rows<T> query_rows(const std::vector<int64_t>& order) const {
    const bool all =
        static_cast<int64_t>(order.size()) == problem.n && std::is_sorted(order.begin(), order.end());
    return {problem.queries, problem.query_stride, all ? nullptr : order.data(),
            static_cast<int64_t>(order.size())};
  }

  Rows<T> all_keys() const {
    if (self) return {problem.queries, problem.query_stride, nullptr, problem.n};
    return {problem.keys, problem.key_stride, nullptr, problem.m};
  }

  Rows<T> valid_keys() const {
    Rows<T> rows = all_keys();
    if (!key_position.empty()) {
      rows.index = keys.data();
      rows.count = static_cast<int64_t>(keys.size());
    }
    return rows;
  }

  int64_t position_of_key(int64_t j) const {
    return key_position.empty() ? j : key_position[j];
  }
};

inline std::vector<int64_t> inverse(const std::vector<int64_t>& order, int64_t size) {
  std::vector<int64_t> position(size, -1);
  for (size_t p = 0; p < order.size(); ++p) position[order[p]] = static_cast<int64_t>(p);
  return position;
}

// (row, column) of the pairs that may not meet; queries[p] is the query at position p, and key_position maps
// a key to its position. Sorted by query position, or by key position for a pass whose rows are the keys.
template <class T, class Position>
std::vector<Pair> excluded_pairs(const Prepared<T>& prepared, const std::vector<int64_t>& queries,
                                 const Position& key_position, bool keys_are_rows) {
  std::vector<Pair> pairs;
  if (prepared.self ? !prepared.problem.exclude_self : !prepared.problem.own) return pairs;
  for (size_t p = 0; p < queries.size(); ++p) {
    const int64_t j = prepared.excluded_key(queries[p]);
    const int64_t column = j < 0 ? -1 : key_position(j);
    if (column < 0) continue;
    const int64_t row = static_cast<int64_t>(p);
    pairs.push_back(keys_are_rows ? Pair{column, row} : Pair{row, column});
  }
  if (keys_are_rows)
    std::sort(pairs.begin(), pairs.end(),
              [](Pair a, Pair b) { return a.row != b.row ? a.row < b.row : a.column < b.column; });
  return pairs;
}

template <class T>
void set_pairs(SimilarityParams<T>& pass, const std::vector<Pair>& pairs) {
  pass.excluded = pairs.data();
  pass.excluded_count = static_cast<int64_t>(pairs.size());
}

// Queries and keys sorted by segment, so that a row's positives are one range of columns.
struct Matching {
  Grouping queries, keys;
  std::vector<int64_t> key_position;
  std::vector<int64_t> begin, end;  // of every row, once set

  // Row p of `rows` meets the members of its own segment in `columns`.
  void set_ranges(const Grouping& rows, const Grouping& columns) {
    begin.clear();
    end.clear();
    for (size_t s = 0; s + 1 < rows.start.size(); ++s)
      for (int64_t p = rows.start[s]; p < rows.start[s + 1]; ++p) {
        begin.push_back(columns.start[s]);
        end.push_back(columns.start[s + 1]);
      }
  }
};

template <class T>
Matching match(const Prepared<T>& prepared, const int64_t* count) {
  const Segments& segments = prepared.segments;
  Matching matching;
  matching.queries = group(segments.of_query, segments.count, prepared.self ? nullptr : count);
  matching.keys = prepared.self ? matching.queries : group(segments.keys(), segments.count);
  matching.key_position = inverse(matching.keys.order, prepared.all_keys().count);
  return matching;
}

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
