// infonce_reduced of infonce.h: the forward pass and what of the backward pass is left to do, at once.

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "infonce.h"
#include "infonce_positives.h"
#include "reserve.h"

namespace wscl {
namespace {

// The forward pass, and the keys' gradient, from one similarity pass whose weights are kept for the columns:
// three GEMMs, where infonce_backward takes two after the forward pass's two.
template <class T>
void forward_and_keys(const InfoNCEProblem<T>& p, bool mean, T* loss, int64_t* count, double* stats,
                      T* direction, T* grad_keys, const Threads& threads) {
  const Prepared<T> prepared(p, threads);
  const Segments& segments = prepared.segments;
  const int64_t n = p.n, d = p.d;
  prepared.count_positives(count);
  std::fill(loss, loss + n, T(0));
  std::fill(stats, stats + n, -kInfinity);
  std::fill(stats + n, stats + 2 * n, 0.0);
  std::fill(direction, direction + n * d, T(0));
  const Meeting meeting = prepared.meeting(Meets::kAll, count, false);
  const std::vector<int64_t>& order = meeting.queries;
  if (order.empty() || meeting.key_count != p.m) std::fill(grad_keys, grad_keys + p.m * d, T(0));
  if (order.empty()) return;

  std::vector<double> row_max(order.size()), row_sum(order.size());
  const Reserved<T> sums(segments.count * d);
  SimilarityParams<T> rows = base_pass(p);
  meeting.set(rows, prepared.query_rows(), prepared.key_rows());
  rows.epilogue = Epilogue::kSoftmax;
  rows.row_max = row_max.data();
  rows.row_sum = row_sum.data();
  rows.output = direction;
  rows.output_stride = d;
  rows.segment_sums = sums.data();
  rows.column_segment = segments.keys().data();
  rows.segments = segments.count;

  const T of_row = mean ? T(1) / static_cast<T>(order.size()) : T(1), scale = static_cast<T>(p.scale);
  const std::vector<double> grad(n, of_row);
  const std::vector<T> weight(order.size(), of_row);
  std::vector<T> share, pull = pull_sums(prepared, grad, count, share, threads);
  for (T& value : pull) value *= -scale;
  SimilarityParams<T> columns = rows;
  columns.epilogue = Epilogue::kKept;
  columns.row_weight = weight.data();
  columns.column_output = grad_keys;
  columns.column_output_stride = d;
  columns.alpha = scale;
  columns.offset = pull.data();
  columns.offset_row = segments.keys().data();
  run_softmax_both(rows, columns, threads);

  to_rows(order, row_max, stats);
  to_rows(order, row_sum, stats + n);
  pull_to_positives(prepared, sums.data(), count, stats, loss, direction, threads);
  give_back_own(prepared, count, share, grad_keys);
}

}  // namespace

template <class In>
double infonce_reduced(const InfoNCEProblem<In>& p, bool mean, int64_t* count, Compute<In>* grad_queries,
                       In* grad_keys, double* grad_scale, const Threads& threads,
                       KeptLogits<Compute<In>> room) {
  using T = Compute<In>;
  if (p.n == 0) {
    if (grad_keys) std::fill(grad_keys, grad_keys + p.m * p.d, In{});
    if (grad_scale) *grad_scale = 0;
    return 0;
  }
  std::vector<T> loss(p.n);
  std::vector<double> stats(infonce_stats(p.inner) * p.n);
  T* const direction = p.keys ? grad_queries : nullptr;  // which becomes the gradient where it is
  bool keys_too = false;
  if constexpr (std::is_same_v<In, T>) {
    keys_too = grad_keys;
    if (keys_too) forward_and_keys(p, mean, loss.data(), count, stats.data(), direction, grad_keys, threads);
  }
  if (!keys_too) infonce_forward<In>(p, loss.data(), count, stats.data(), direction, threads, room);

  const auto anchors = std::count_if(count, count + p.n, [](int64_t positives) { return positives > 0; });
  const int64_t size = mean ? std::max<int64_t>(1, anchors) : 1;
  const double sum = std::accumulate(loss.begin(), loss.end(), 0.0);
  if (!grad_queries) return sum / size;
  const std::vector<T> upstream(p.n, T(1) / static_cast<T>(size));
  infonce_backward<In>(p, upstream.data(), count, stats.data(), direction, grad_queries, nullptr, grad_scale,
                       threads, room);
  return sum / size;
}

#define WSCL_INSTANTIATE(In)                                                                                 \
  template double infonce_reduced<In>(const InfoNCEProblem<In>&, bool, int64_t*, Compute<In>*, In*, double*, \
                                      const Threads&, KeptLogits<Compute<In>>);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
