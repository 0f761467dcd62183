// The passes of infonce.h, put together from segments, segment sums and similarity passes.

#include "infonce.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "clusters.h"
#include "similarity.h"

namespace wscl {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kRowGrain = 256;

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

std::vector<int64_t> inverse(const std::vector<int64_t>& order, int64_t size) {
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

// Softmax of the queries at `order` over `keys`; statistics scattered to stats[0][i], stats[1][i].
template <class T>
void softmax_pass(SimilarityParams<T> pass, const Prepared<T>& prepared, const std::vector<int64_t>& order,
                  Rows<T> keys, double* stats, const Threads& threads) {
  std::vector<double> row_max(order.size()), row_sum(order.size());
  pass.epilogue = Epilogue::kSoftmax;
  pass.x = prepared.query_rows(order);
  pass.y = keys;
  pass.row_max = row_max.data();
  pass.row_sum = row_sum.data();
  run_similarity(pass, threads);
  for (size_t p = 0; p < order.size(); ++p) {
    stats[order[p]] = row_max[p];
    stats[prepared.problem.n + order[p]] = row_sum[p];
  }
}

double natural_lse(const double* stats, int64_t n, int64_t i) {
  return (stats[i] + std::log2(stats[n + i])) / kLog2E;
}

template <class T>
double dot(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

}  // namespace

template <class T>
void infonce_forward(const InfoNCEProblem<T>& p, T* loss, int64_t* count, double* stats, T* direction,
                     const Threads& threads) {
  Prepared<T> prepared(p);
  prepared.count_positives(count);
  prepared.choose_queries(count);
  const int64_t n = p.n, d = p.d;
  std::fill(loss, loss + n, T(0));
  for (int64_t s = 0; s < infonce_stats(p.inner); ++s)
    std::fill(stats + s * n, stats + (s + 1) * n, s % 2 ? 0.0 : -kInfinity);
  if (direction) std::fill(direction, direction + n * d, T(0));

  SimilarityParams<T> pass = base_pass(p);
  pass.output = direction;
  pass.output_stride = d;
  const auto pairs =
      excluded_pairs(prepared, prepared.queries, [&](int64_t j) { return prepared.position_of_key(j); }, false);
  set_pairs(pass, pairs);
  softmax_pass(pass, prepared, prepared.queries, prepared.valid_keys(), stats, threads);

  if (p.inner) {
    Matching matching = match(prepared, count);
    matching.set_ranges(matching.queries, matching.keys);
    const auto matched_pairs = excluded_pairs(
        prepared, matching.queries.order, [&](int64_t j) { return matching.key_position[j]; }, false);
    set_pairs(pass, matched_pairs);
    pass.begin = matching.begin.data();
    pass.end = matching.end.data();
    pass.alpha = -1;
    pass.accumulate = true;
    Rows<T> keys = prepared.all_keys();
    keys.index = matching.keys.order.data();
    keys.count = static_cast<int64_t>(matching.keys.order.size());
    softmax_pass(pass, prepared, matching.queries.order, keys, stats + 2 * n, threads);
    for (int64_t i = 0; i < n; ++i)
      if (count[i] > 0)
        loss[i] = static_cast<T>(natural_lse(stats, n, i) - natural_lse(stats + 2 * n, n, i) +
                                 std::log(static_cast<double>(count[i])));
    return;
  }

  std::vector<T> sums(prepared.segments.count * d);
  segment_sums<T>(prepared.all_keys(), d, prepared.segments.keys().data(), nullptr, prepared.segments.count,
                  sums.data(), threads);
  threads.ranges(n, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<T> mean(d);
    for (int64_t i = begin; i < end; ++i) {
      if (count[i] == 0) continue;
      const T* sum = &sums[prepared.segments.of_query[i] * d];
      const T share = T(1) / static_cast<T>(count[i]);
      const T* less =
          prepared.excludes_positive(i) ? prepared.all_keys().row(prepared.excluded_key(i)) : nullptr;
      for (int64_t c = 0; c < d; ++c) mean[c] = (less ? sum[c] - less[c] : sum[c]) * share;
      const double mean_logit = p.scale * dot(p.queries + i * p.query_stride, mean.data(), d);
      loss[i] = static_cast<T>(natural_lse(stats, n, i) - mean_logit);
      if (direction)
        for (int64_t c = 0; c < d; ++c) direction[i * d + c] -= mean[c];
    }
  });
}

namespace {

// Everything the backward passes share: the upstream gradient of each query, zero where it takes no part.
template <class T>
std::vector<double> upstream(const T* grad_loss, const int64_t* count, int64_t n) {
  std::vector<double> grad(n);
  for (int64_t i = 0; i < n; ++i) grad[i] = count[i] > 0 ? static_cast<double>(grad_loss[i]) : 0.0;
  return grad;
}

// grad_keys (+)= alpha · Σ_i g_i softmax_ij q_i over the queries at `order`.
template <class T>
void key_pass(SimilarityParams<T> pass, const Prepared<T>& prepared, Rows<T> keys,
              const std::vector<int64_t>& order, const std::vector<double>& grad, const double* stats,
              const Threads& threads) {
  std::vector<T> shift(order.size()), weight(order.size());
  for (size_t q = 0; q < order.size(); ++q) {
    shift[q] = static_cast<T>(stats[order[q]]);
    weight[q] = static_cast<T>(grad[order[q]] / stats[prepared.problem.n + order[q]]);
  }
  pass.epilogue = Epilogue::kColumns;
  pass.x = keys;
  pass.y = prepared.query_rows(order);
  pass.column_shift = shift.data();
  pass.column_weight = weight.data();
  run_similarity(pass, threads);
}

// grad (+)= alpha · Σ_j (g_i softmax_ij + g_j softmax_ji) x_j over the rows at `order`. One exponential a pair
// where the rows' log-sum-exps lie close enough together for one common shift.
template <class T>
void symmetric_pass(SimilarityParams<T> pass, const Prepared<T>& prepared, const std::vector<int64_t>& order,
                    const std::vector<double>& grad, const double* stats, const Threads& threads) {
  constexpr double kSafeRange = sizeof(T) == sizeof(float) ? 60 : 500;  // log2 of the spread of the weights
  const int64_t n = prepared.problem.n;
  double low = kInfinity, high = -kInfinity;
  for (int64_t i : order) {
    const double lse = stats[i] + std::log2(stats[n + i]);
    if (stats[n + i] == 0) continue;
    low = std::min(low, lse);
    high = std::max(high, lse);
  }
  const bool shared = low <= high && high - low <= kSafeRange;
  pass.shift = shared ? static_cast<T>(high) : T(0);
  std::vector<T> shift(order.size()), weight(order.size());
  for (size_t q = 0; q < order.size(); ++q) {
    const double top = stats[order[q]], sum = stats[n + order[q]];
    if (sum == 0) continue;  // it meets no one
    shift[q] = static_cast<T>(top);
    weight[q] = static_cast<T>(grad[order[q]] / sum * (shared ? std::exp2(pass.shift - top) : 1));
  }
  pass.epilogue = shared ? Epilogue::kShared : Epilogue::kSymmetric;
  pass.x = pass.y = prepared.query_rows(order);
  pass.row_shift = pass.column_shift = shift.data();
  pass.row_weight = pass.column_weight = weight.data();
  run_similarity(pass, threads);
}

// Σ_{i of the segment} share_i q_i, with share_i = g_i / |P(i)|: what the positives of "out" pull towards.
template <class T>
std::vector<T> pull_sums(const Prepared<T>& prepared, const std::vector<double>& grad, const int64_t* count,
                         std::vector<T>& share, const Threads& threads) {
  const InfoNCEProblem<T>& p = prepared.problem;
  share.resize(p.n);
  for (int64_t i = 0; i < p.n; ++i) share[i] = count[i] > 0 ? static_cast<T>(grad[i] / count[i]) : T(0);
  std::vector<T> sums(prepared.segments.count * p.d);
  segment_sums<T>({p.queries, p.query_stride, nullptr, p.n}, p.d, prepared.segments.of_query.data(),
                  share.data(), prepared.segments.count, sums.data(), threads);
  return sums;
}

template <class T>
void key_backward(const InfoNCEProblem<T>& p, const std::vector<double>& grad, const int64_t* count,
                  const double* stats, T* grad_keys, const Threads& threads) {
  Prepared<T> prepared(p);
  prepared.choose_queries(count);
  const int64_t d = p.d;
  SimilarityParams<T> pass = base_pass(p);
  pass.output = grad_keys;
  pass.output_stride = d;
  pass.alpha = static_cast<T>(p.scale);
  const auto pairs =
      excluded_pairs(prepared, prepared.queries, [&](int64_t j) { return prepared.position_of_key(j); }, true);
  set_pairs(pass, pairs);
  if (!prepared.key_position.empty()) std::fill(grad_keys, grad_keys + p.m * d, T(0));
  key_pass(pass, prepared, prepared.valid_keys(), prepared.queries, grad, stats, threads);

  if (p.inner) {
    Matching matching = match(prepared, count);
    matching.set_ranges(matching.keys, matching.queries);
    const auto matched_pairs = excluded_pairs(
        prepared, matching.queries.order, [&](int64_t j) { return matching.key_position[j]; }, true);
    set_pairs(pass, matched_pairs);
    pass.begin = matching.begin.data();
    pass.end = matching.end.data();
    pass.alpha = -pass.alpha;
    pass.accumulate = true;
    Rows<T> keys = prepared.all_keys();
    keys.index = matching.keys.order.data();
    keys.count = static_cast<int64_t>(matching.keys.order.size());
    key_pass(pass, prepared, keys, matching.queries.order, grad, stats + 2 * p.n, threads);
    return;
  }

  std::vector<T> share;
  const std::vector<T> sums = pull_sums(prepared, grad, count, share, threads);
  const T scale = static_cast<T>(p.scale);
  threads.ranges(p.m, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t s = prepared.segments.of_key[j];
      if (s < 0) continue;
      for (int64_t c = 0; c < d; ++c) grad_keys[j * d + c] -= scale * sums[s * d + c];
    }
  });
  // A query does not pull its own key, which the sum of its segment counted.
  for (int64_t i = 0; i < p.n; ++i) {
    if (count[i] == 0 || !prepared.excludes_positive(i)) continue;
    const int64_t j = prepared.excluded_key(i);
    for (int64_t c = 0; c < d; ++c)
      grad_keys[j * d + c] += scale * share[i] * p.queries[i * p.query_stride + c];
  }
}

template <class T>
void self_backward(const InfoNCEProblem<T>& p, const std::vector<double>& grad, const int64_t* count,
                   const double* stats, T* grad_queries, double* grad_scale, const Threads& threads) {
  Prepared<T> prepared(p);
  prepared.choose_queries(count);
  const int64_t n = p.n, d = p.d;
  SimilarityParams<T> pass = base_pass(p);
  pass.output = grad_queries;
  pass.output_stride = d;
  pass.alpha = static_cast<T>(p.scale);
  const std::vector<int64_t> position = inverse(prepared.queries, n);
  const auto pairs = excluded_pairs(prepared, prepared.queries, [&](int64_t j) { return position[j]; }, false);
  set_pairs(pass, pairs);
  if (static_cast<int64_t>(prepared.queries.size()) != n) std::fill(grad_queries, grad_queries + n * d, T(0));
  symmetric_pass(pass, prepared, prepared.queries, grad, stats, threads);

  if (p.inner) {
    Matching matching = match(prepared, count);
    matching.set_ranges(matching.queries, matching.keys);
    const auto matched_pairs = excluded_pairs(
        prepared, matching.queries.order, [&](int64_t j) { return matching.key_position[j]; }, false);
    set_pairs(pass, matched_pairs);
    pass.begin = matching.begin.data();
    pass.end = matching.end.data();
    pass.alpha = -pass.alpha;
    pass.accumulate = true;
    symmetric_pass(pass, prepared, matching.queries.order, grad, stats + 2 * n, threads);
  } else {
    std::vector<T> share;
    const std::vector<T> pulled = pull_sums(prepared, grad, count, share, threads);
    std::vector<T> sums(prepared.segments.count * d);
    segment_sums<T>(prepared.all_keys(), d, prepared.segments.of_query.data(), nullptr, prepared.segments.count,
                    sums.data(), threads);
    const T scale = static_cast<T>(p.scale);
    threads.ranges(n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = prepared.segments.of_query[i];
        if (s < 0) continue;
        const T* x = p.queries + i * p.query_stride;
        const T less = p.exclude_self ? T(1) : T(0);
        for (int64_t c = 0; c < d; ++c)
          grad_queries[i * d + c] -= scale * (share[i] * (sums[s * d + c] - less * x[c]) +
                                              (pulled[s * d + c] - less * share[i] * x[c]));
      }
    });
  }
  // Every logit has two rows of x in it: Σ_i ⟨x_i, ∂L/∂x_i⟩ counts each of them twice.
  if (grad_scale) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += dot(p.queries + i * p.query_stride, grad_queries + i * d, d);
    *grad_scale = sum / (2 * p.scale);
  }
}

}  // namespace

template <class T>
void infonce_backward(const InfoNCEProblem<T>& p, const T* grad_loss, const int64_t* count, const double* stats,
                      const T* direction, T* grad_queries, T* grad_keys, double* grad_scale,
                      const Threads& threads) {
  const std::vector<double> grad = upstream(grad_loss, count, p.n);
  if (!p.keys) return self_backward(p, grad, count, stats, grad_queries, grad_scale, threads);
  if (grad_queries)
    threads.ranges(p.n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T factor = static_cast<T>(grad[i] * p.scale);
        for (int64_t c = 0; c < p.d; ++c) grad_queries[i * p.d + c] = factor * direction[i * p.d + c];
      }
    });
  if (grad_scale) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i)
      sum += grad[i] * dot(p.queries + i * p.query_stride, direction + i * p.d, p.d);
    *grad_scale = sum;
  }
  if (grad_keys) key_backward(p, grad, count, stats, grad_keys, threads);
}

template void infonce_forward<float>(const InfoNCEProblem<float>&, float*, int64_t*, double*, float*,
                                     const Threads&);
template void infonce_forward<double>(const InfoNCEProblem<double>&, double*, int64_t*, double*, double*,
                                      const Threads&);
template void infonce_backward<float>(const InfoNCEProblem<float>&, const float*, const int64_t*, const double*,
                                      const float*, float*, float*, double*, const Threads&);
template void infonce_backward<double>(const InfoNCEProblem<double>&, const double*, const int64_t*,
                                       const double*, const double*, double*, double*, double*, const Threads&);

}  // namespace wscl
