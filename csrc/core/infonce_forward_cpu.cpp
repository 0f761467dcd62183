// The forward pass of infonce.h, put together from a similarity pass and segment sums ("out") or a second
// similarity pass over the positives ("in").

#include <algorithm>
#include <cmath>
#include <vector>

#include "infonce.h"
#include "infonce_positives.h"
#include "reserve.h"
#include "softmax_weights.h"

namespace wscl {
namespace {

// Softmax over the pairs of a meeting; statistics scattered to stats[0][i], stats[1][i].
template <class In>
void softmax_pass(SimilarityParams<In> pass, const Prepared<In>& prepared, Meeting meeting, double* stats,
                  const Threads& threads) {
  const std::vector<int64_t>& order = meeting.queries;
  std::vector<double> row_max(order.size()), row_sum(order.size());
  meeting.set(pass, prepared.query_rows(), prepared.key_rows());
  pass.epilogue = Epilogue::kSoftmax;
  pass.row_max = row_max.data();
  pass.row_sum = row_sum.data();
  run_similarity(pass, threads);
  to_rows(order, row_max, stats);
  to_rows(order, row_sum, stats + prepared.problem.n);
}

// The same where the queries are the keys, from one half of the symmetric matrix: a row's softmax is that of
// the pairs it begins and of those it ends.
template <class In>
void symmetric_softmax_pass(SimilarityParams<In> pass, const Prepared<In>& prepared, Meeting meeting,
                            double* stats, const Threads& threads) {
  const InfoNCEProblem<In>& p = prepared.problem;
  const std::vector<int64_t>& order = meeting.queries;
  std::vector<double> row_max(order.size()), row_sum(order.size());
  std::vector<double> column_max(order.size(), -kInfinity), column_sum(order.size(), 0.0);
  meeting.keep_upper_triangle();
  meeting.set(pass, prepared.query_rows(), prepared.key_rows());
  pass.epilogue = Epilogue::kTwoWay;
  pass.row_max = row_max.data();
  pass.row_sum = row_sum.data();
  pass.column_max = column_max.data();
  pass.column_sum = column_sum.data();
  run_similarity(pass, threads);
  for (size_t r = 0; r < order.size(); ++r) {
    Softmax softmax{row_max[r], row_sum[r]};
    softmax.add(column_max[r], column_sum[r]);
    if (!p.exclude_self) {
      const double own = own_logit(p, order[r]);
      softmax.add(std::ceil(own), std::exp2(own - std::ceil(own)));
    }
    stats[order[r]] = softmax.max;
    stats[p.n + order[r]] = softmax.sum;
  }
}

}  // namespace

template <class In>
void infonce_forward(const InfoNCEProblem<In>& p, Compute<In>* loss, int64_t* count, double* stats,
                     Compute<In>* direction, const Threads& threads, KeptLogits<Compute<In>> room) {
  using T = Compute<In>;
  Prepared<In> prepared(p, threads);
  prepared.count_positives(count);
  const int64_t n = p.n, d = p.d;
  std::fill(loss, loss + n, T(0));
  for (int64_t s = 0; s < infonce_stats(p.inner); ++s)
    std::fill(stats + s * n, stats + (s + 1) * n, s % 2 ? 0.0 : -kInfinity);
  if (direction) std::fill(direction, direction + n * d, T(0));

  SimilarityParams<In> pass = base_pass(p);
  pass.output = direction;
  pass.output_stride = d;
  // Written wherever a query has positives: no other reads its cluster's sum.
  const Reserved<T> sums(p.inner ? 0 : prepared.segments.count * d);
  if (!p.inner && !prepared.self) {
    pass.segment_sums = sums.data();
    pass.column_segment = prepared.segments.keys().data();
    pass.segments = prepared.segments.count;
  }
  const auto run = prepared.self ? symmetric_softmax_pass<In> : softmax_pass<In>;
  pass.logits = room;
  run(pass, prepared, prepared.meeting(Meets::kAll, count, false), stats, threads);

  if (p.inner) {
    pass.alpha = -1;
    pass.accumulate = true;
    pass.logits = {};
    run(pass, prepared, prepared.meeting(Meets::kSame, count, false), stats + 2 * n, threads);
    for (int64_t i = 0; i < n; ++i)
      if (count[i] > 0)
        loss[i] = static_cast<T>(natural_lse(stats, n, i) - natural_lse(stats + 2 * n, n, i) +
                                 std::log(static_cast<double>(count[i])));
    return;
  }

  if (prepared.self)  // only half of each row was read
    segment_sums<In>(prepared.key_rows(), d, prepared.segments.keys().data(), nullptr, prepared.segments.count,
                     sums.data(), threads);
  pull_to_positives(prepared, sums.data(), count, stats, loss, direction, threads);
}

#define WSCL_INSTANTIATE(In)                                                                                  \
  template void infonce_forward<In>(const InfoNCEProblem<In>&, Compute<In>*, int64_t*, double*, Compute<In>*, \
                                    const Threads&, KeptLogits<Compute<In>>);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
