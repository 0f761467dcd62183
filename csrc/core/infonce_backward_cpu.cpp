// The backward pass of infonce.h: the keys' gradient from a transposed pass, or everything from a symmetric
// one where the queries are the keys.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "infonce.h"
#include "infonce_positives.h"
#include "softmax_weights.h"

namespace wscl {
namespace {

constexpr int64_t kNarrowGrain = 1 << 16;
constexpr int64_t kBlockBytes = 16 << 20;  // of a block of keys' gradients
constexpr int64_t kLeastBlock = 1024;      // keys: fewer do not pay for finding who belongs to whom again

// Everything the backward passes share: the upstream gradient of each query, zero where it takes no part.
template <class T>
std::vector<double> upstream(const T* grad_loss, const int64_t* count, int64_t n) {
  std::vector<double> grad(n);
  for (int64_t i = 0; i < n; ++i) grad[i] = count[i] > 0 ? static_cast<double>(grad_loss[i]) : 0.0;
  return grad;
}

// grad_keys (+)= alpha · Σ_i g_i softmax_ij q_i over the pairs of a meeting.
template <class In>
void key_pass(SimilarityParams<In> pass, const Prepared<In>& prepared, const Meeting& meeting,
              const std::vector<double>& grad, const double* stats, const Threads& threads) {
  using T = Compute<In>;
  const std::vector<int64_t>& order = meeting.queries;
  std::vector<T> shift(order.size()), weight(order.size());
  for (size_t q = 0; q < order.size(); ++q) {
    shift[q] = static_cast<T>(stats[order[q]]);
    weight[q] = static_cast<T>(grad[order[q]] / stats[prepared.problem.n + order[q]]);
  }
  meeting.set(pass, prepared.query_rows(), prepared.key_rows());
  pass.epilogue = Epilogue::kColumns;
  pass.column_shift = shift.data();
  pass.column_weight = weight.data();
  run_similarity(pass, threads);
}

// grad += alpha · Σ_j (g_i softmax_ij + g_j softmax_ji) x_j over the pairs of a meeting, from one half of the
// symmetric matrix. One exponential a pair where the rows' log-sum-exps lie close enough together for one
// common shift.
template <class In>
void symmetric_pass(SimilarityParams<In> pass, const Prepared<In>& prepared, Meeting meeting,
                    const std::vector<double>& grad, const double* stats, const Threads& threads) {
  using T = Compute<In>;
  const InfoNCEProblem<In>& p = prepared.problem;
  const std::vector<int64_t>& order = meeting.queries;
  std::vector<Softmax> softmaxes(order.size());
  for (size_t q = 0; q < order.size(); ++q)
    softmaxes[q] = {stats[order[q]], stats[p.n + order[q]], grad[order[q]]};
  T common = 0;
  const T* const shared = find_common_shift<T>({&softmaxes}, &common) ? &common : nullptr;
  const SoftmaxWeights<T> weights(softmaxes, shared);
  meeting.keep_upper_triangle();
  meeting.set(pass, prepared.query_rows(), prepared.key_rows());
  set_softmaxes(pass, weights, weights, shared);
  pass.accumulate = true;
  pass.column_output = pass.output;
  pass.column_output_stride = pass.output_stride;
  run_similarity(pass, threads);
  if (p.exclude_self) return;
  for (size_t q = 0; q < order.size(); ++q) {  // a query meets itself from both sides
    const Softmax& softmax = softmaxes[q];
    if (softmax.empty()) continue;
    const T weight =
        static_cast<T>(2 * softmax.grad * std::exp2(own_logit(p, order[q]) - softmax.max) / softmax.sum) *
        pass.alpha;
    const In* x = p.queries + order[q] * p.query_stride;
    T* to = pass.output + order[q] * pass.output_stride;
    for (int64_t c = 0; c < p.d; ++c) to[c] += weight * to_compute(x[c]);
  }
}

// The keys' gradient, in the keys' dtype or in the one that is computed with.
template <class In, class Out>
void key_backward(const InfoNCEProblem<In>& p, const std::vector<double>& grad, const int64_t* count,
                  const double* stats, Out* grad_keys, const Threads& threads) {
  using T = Compute<In>;
  Prepared<In> prepared(p, threads);
  const int64_t d = p.d;
  const T scale = static_cast<T>(p.scale);
  SimilarityParams<In> pass = base_pass(p);
  if constexpr (std::is_same<In, Out>::value)
    pass.narrow_output = grad_keys;
  else
    pass.output = grad_keys;
  pass.output_stride = d;
  pass.alpha = scale;
  const Meeting all = prepared.meeting(Meets::kAll, count, true);
  if (all.key_count != p.m) std::fill(grad_keys, grad_keys + p.m * d, Out{});
  std::vector<T> share, pull;
  if (!p.inner) {  // what the positives pull is the same for all keys of a cluster
    pull = pull_sums(prepared, grad, count, share, threads);
    for (T& value : pull) value *= -scale;
    pass.offset = pull.data();
    pass.offset_row = prepared.segments.of_key.data();
  }
  key_pass(pass, prepared, all, grad, stats, threads);

  if (p.inner) {
    pass.alpha = -scale;
    pass.accumulate = true;
    key_pass(pass, prepared, prepared.meeting(Meets::kSame, count, true), grad, stats + 2 * p.n, threads);
  } else {
    give_back_own(prepared, count, share, grad_keys);
  }
}

// Gradients of halves that are summed in several steps are summed in float and rounded once, a block of keys
// after the other: a block has a problem of its own, whose queries have the statistics of all keys.
template <class In>
void key_backward_in_blocks(const InfoNCEProblem<In>& p, const std::vector<double>& grad, const int64_t* count,
                            const double* stats, In* grad_keys, const Threads& threads) {
  using T = Compute<In>;
  const int64_t most =
      std::max<int64_t>(kLeastBlock, kBlockBytes / (p.d * static_cast<int64_t>(sizeof(T)) + 1));
  std::vector<T> wide(std::min(most, p.m) * p.d);
  std::vector<int64_t> own(p.own ? p.n : 0);
  for (int64_t first = 0; first < p.m; first += most) {
    InfoNCEProblem<In> block = p;
    block.m = std::min(most, p.m - first);
    block.keys = p.keys + first * p.key_stride;
    block.key_clusters = p.key_clusters + first;
    for (size_t i = 0; i < own.size(); ++i) own[i] = p.own[i] - first;
    block.own = p.own ? own.data() : nullptr;
    key_backward(block, grad, count, stats, wide.data(), threads);
    In* const to = grad_keys + first * p.d;
    threads.ranges(block.m * p.d, kNarrowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) from_compute(wide[e], to + e);
    });
  }
}

template <class In>
void self_backward(const InfoNCEProblem<In>& p, const std::vector<double>& grad, const int64_t* count,
                   const double* stats, Compute<In>* grad_queries, double* grad_scale, const Threads& threads,
                   KeptLogits<Compute<In>> room) {
  using T = Compute<In>;
  Prepared<In> prepared(p, threads);
  const int64_t n = p.n, d = p.d;
  SimilarityParams<In> pass = base_pass(p);
  pass.output = grad_queries;
  pass.output_stride = d;
  pass.alpha = static_cast<T>(p.scale);
  const Meeting all = prepared.meeting(Meets::kAll, count, false);
  std::fill(grad_queries, grad_queries + n * d, T(0));
  pass.logits = room;
  pass.logits_known = true;
  symmetric_pass(pass, prepared, all, grad, stats, threads);

  if (p.inner) {
    pass.alpha = -pass.alpha;
    pass.logits = {};
    symmetric_pass(pass, prepared, prepared.meeting(Meets::kSame, count, false), grad, stats + 2 * n, threads);
  } else {
    std::vector<T> share;
    const std::vector<T> pulled = pull_sums(prepared, grad, count, share, threads);
    std::vector<T> sums(prepared.segments.count * d);
    segment_sums<In>(prepared.key_rows(), d, prepared.segments.of_query.data(), nullptr,
                     prepared.segments.count, sums.data(), threads);
    const T scale = static_cast<T>(p.scale);
    threads.ranges(n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = prepared.segments.of_query[i];
        if (s < 0) continue;
        const In* x = p.queries + i * p.query_stride;
        const T less = p.exclude_self ? T(1) : T(0);
        for (int64_t c = 0; c < d; ++c)
          grad_queries[i * d + c] -= scale * (share[i] * (sums[s * d + c] - less * to_compute(x[c])) +
                                              (pulled[s * d + c] - less * share[i] * to_compute(x[c])));
      }
    });
  }
  // Every logit has two rows of x in it: Σ_i ⟨x_i, ∂L/∂x_i⟩ counts each of them twice.
  if (grad_scale) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
      if (prepared.segments.of_query[i] != kIgnored)
        sum += dot(p.queries + i * p.query_stride, grad_queries + i * d, d);
    *grad_scale = sum / (2 * p.scale);
  }
}

}  // namespace

template <class In>
void infonce_backward(const InfoNCEProblem<In>& p, const Compute<In>* grad_loss, const int64_t* count,
                      const double* stats, const Compute<In>* direction, Compute<In>* grad_queries,
                      In* grad_keys, double* grad_scale, const Threads& threads, KeptLogits<Compute<In>> room) {
  using T = Compute<In>;
  const std::vector<double> grad = upstream(grad_loss, count, p.n);
  if (!p.keys) return self_backward(p, grad, count, stats, grad_queries, grad_scale, threads, room);
  if (grad_scale) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i)
      if (grad[i] != 0) sum += grad[i] * dot(p.queries + i * p.query_stride, direction + i * p.d, p.d);
    *grad_scale = sum;
  }
  if (grad_queries)  // last: it may lie where the direction does
    threads.ranges(p.n, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T factor = static_cast<T>(grad[i] * p.scale);
        for (int64_t c = 0; c < p.d; ++c) grad_queries[i * p.d + c] = factor * direction[i * p.d + c];
      }
    });
  if (!grad_keys) return;
  if (sizeof(In) != sizeof(T) && (p.inner || p.own))
    key_backward_in_blocks(p, grad, count, stats, grad_keys, threads);
  else
    key_backward(p, grad, count, stats, grad_keys, threads);
}

#define WSCL_INSTANTIATE(In)                                                                        \
  template void infonce_backward<In>(const InfoNCEProblem<In>&, const Compute<In>*, const int64_t*, \
                                     const double*, const Compute<In>*, Compute<In>*, In*, double*, \
                                     const Threads&, KeptLogits<Compute<In>>);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
