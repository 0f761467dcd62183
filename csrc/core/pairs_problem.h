// What the passes over pairs of queries and keys read: who meets whom. No torch, no Python.
//
// Row i meets every key, those of its own cluster, or those of other clusters, less its own key; queries and
// keys that have no cluster take no part.
#pragma once

#include <cstdint>
#include <vector>

#include "clusters.h"
#include "similarity.h"

namespace wscl {

template <class In>
struct PairsProblem {
  const In* queries;  // [n, d], unit column stride
  int64_t query_stride;
  int64_t n;
  const In* keys;  // [m, d]
  int64_t key_stride;
  int64_t m;
  int64_t d;
  const int64_t* query_clusters;  // [n], or null where all queries take part; needed but for kAll
  const int64_t* key_clusters;    // [m], the same
  const int64_t* own;             // [n] a query's own key, outside [0, m) for none; or null
  Meets meets;
  int64_t ignore_index;
  double scale;
};

template <class In>
Segments segments_of(const PairsProblem<In>& p, const Threads& threads) {
  if (p.meets != Meets::kAll)
    return find_segments(p.query_clusters, p.n, p.key_clusters, p.m, false, p.ignore_index, threads);
  const auto flags = [&](const int64_t* clusters, int64_t size) {
    std::vector<int64_t> segment(size, 0);
    for (int64_t i = 0; clusters && i < size; ++i)
      if (clusters[i] == p.ignore_index) segment[i] = kIgnored;
    return segment;
  };
  Segments segments;
  segments.count = 1;
  segments.of_query = flags(p.query_clusters, p.n);
  segments.of_key = flags(p.key_clusters, p.m);
  return segments;
}

template <class In>
Meeting meeting_of(const PairsProblem<In>& p, const int64_t* keep, bool keys_are_rows, const Threads& threads) {
  OwnKeys own;
  own.own = p.own;
  own.m = p.m;
  return meet(p.meets, segments_of(p, threads), own, keep, keys_are_rows);
}

template <class In>
SimilarityParams<In> pass_of(const PairsProblem<In>& p, const Meeting& meeting) {
  SimilarityParams<In> pass;
  pass.d = p.d;
  pass.scale = static_cast<Compute<In>>(p.scale * kLog2E);
  meeting.set(pass, {p.queries, p.query_stride, nullptr, p.n}, {p.keys, p.key_stride, nullptr, p.m});
  pass.output_stride = p.d;
  return pass;
}

}  // namespace wscl
