// What positives outside of the logarithm add to losses and gradients, by sums over clusters.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "infonce_problem.h"

namespace wscl {

template <class In>
bool finite(const In* row, int64_t d) {
  return std::all_of(row, row + d, [](In x) { return std::isfinite(to_compute(x)); });
}

// The mean of i's positives, one by one: where its own key is not finite it cannot be taken off a sum.
template <class In>
void mean_of_positives(const Prepared<In>& prepared, int64_t i, Compute<In> share, Compute<In>* mean) {
  const std::vector<int64_t>& of_key = prepared.segments.keys();
  const int64_t d = prepared.problem.d, own = prepared.own.of(i);
  std::vector<double> sum(d, 0.0);
  for (int64_t j = 0; j < prepared.problem.m; ++j) {
    if (of_key[j] != prepared.segments.of_query[i] || j == own) continue;
    const In* key = prepared.key_rows().row(j);
    for (int64_t c = 0; c < d; ++c) sum[c] += to_compute(key[c]);
  }
  for (int64_t c = 0; c < d; ++c) mean[c] = static_cast<Compute<In>>(sum[c]) * share;
}

inline double natural_lse(const double* stats, int64_t n, int64_t i) {
  return (stats[i] + std::log2(stats[n + i])) / kLog2E;
}

// The losses, from the sums of the keys of each cluster and from `stats`; the mean of the positives is taken
// off the direction.
template <class In>
void pull_to_positives(const Prepared<In>& prepared, const Compute<In>* sums, const int64_t* count,
                       const double* stats, Compute<In>* loss, Compute<In>* direction, const Threads& threads) {
  using T = Compute<In>;
  const InfoNCEProblem<In>& p = prepared.problem;
  const int64_t n = p.n, d = p.d;
  threads.ranges(n, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<T> mean(d);
    for (int64_t i = begin; i < end; ++i) {
      if (count[i] == 0) continue;
      const T* sum = sums + prepared.segments.of_query[i] * d;
      const T share = T(1) / static_cast<T>(count[i]);
      const In* less = prepared.excludes_positive(i) ? prepared.key_rows().row(prepared.own.of(i)) : nullptr;
      for (int64_t c = 0; c < d; ++c) mean[c] = (less ? sum[c] - to_compute(less[c]) : sum[c]) * share;
      if (less && !finite(less, d)) mean_of_positives(prepared, i, share, mean.data());
      const double mean_logit = p.scale * dot(p.queries + i * p.query_stride, mean.data(), d);
      loss[i] = static_cast<T>(natural_lse(stats, n, i) - mean_logit);
      if (direction)
        for (int64_t c = 0; c < d; ++c) direction[i * d + c] -= mean[c];
    }
  });
}

// Σ_{i of the segment} share_i q_i, with share_i = g_i / |P(i)|: what the positives of "out" pull towards.
template <class In>
std::vector<Compute<In>> pull_sums(const Prepared<In>& prepared, const std::vector<double>& grad,
                                   const int64_t* count, std::vector<Compute<In>>& share,
                                   const Threads& threads) {
  using T = Compute<In>;
  const InfoNCEProblem<In>& p = prepared.problem;
  share.resize(p.n);
  for (int64_t i = 0; i < p.n; ++i) share[i] = count[i] > 0 ? static_cast<T>(grad[i] / count[i]) : T(0);
  std::vector<T> sums(prepared.segments.count * p.d);
  segment_sums<In>({p.queries, p.query_stride, nullptr, p.n}, p.d, prepared.segments.of_query.data(),
                   share.data(), prepared.segments.count, sums.data(), threads);
  return sums;
}

// A query does not pull its own key, which the sum over its cluster counted.
template <class In, class Out>
void give_back_own(const Prepared<In>& prepared, const int64_t* count, const std::vector<Compute<In>>& share,
                   Out* grad_keys) {
  const InfoNCEProblem<In>& p = prepared.problem;
  for (int64_t i = 0; i < p.n; ++i) {
    if (count[i] == 0 || !prepared.excludes_positive(i)) continue;
    const Compute<In> factor = static_cast<Compute<In>>(p.scale) * share[i];
    const In* query = p.queries + i * p.query_stride;
    Out* to = grad_keys + prepared.own.of(i) * p.d;
    for (int64_t c = 0; c < p.d; ++c) from_compute(to_compute(to[c]) + factor * to_compute(query[c]), to + c);
  }
}

}  // namespace wscl
