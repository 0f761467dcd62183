// infonce_forward_both of infonce.h: the loss and the gradients of both sides, from one similarity pass whose
// weights are kept for the columns.

#include <algorithm>
#include <vector>

#include "infonce.h"
#include "infonce_positives.h"

namespace wscl {

template <class T>
void infonce_forward_both(const InfoNCEProblem<T>& p, T* loss, int64_t* count, double* stats, T* direction,
                          T* key_direction, const Threads& threads) {
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
  if (order.empty() || meeting.key_count != p.m) std::fill(key_direction, key_direction + p.m * d, T(0));
  if (order.empty()) return;

  std::vector<double> row_max(order.size()), row_sum(order.size());
  std::vector<T> sums(segments.count * d);
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

  // What upstream gives each query, rounded as PyTorch rounds it: the factor is then 1 to the bit.
  const T mean = T(1) / static_cast<T>(order.size());
  const T scale = static_cast<T>(p.scale);
  const std::vector<double> grad(n, mean);
  const std::vector<T> weight(order.size(), mean);
  std::vector<T> share, pull = pull_sums(prepared, grad, count, share, threads);
  for (T& value : pull) value *= -scale;
  SimilarityParams<T> columns = rows;
  columns.epilogue = Epilogue::kKept;
  columns.row_weight = weight.data();
  columns.column_output = key_direction;
  columns.column_output_stride = d;
  columns.alpha = scale;
  columns.offset = pull.data();
  columns.offset_row = segments.keys().data();
  run_softmax_both(rows, columns, threads);

  for (size_t q = 0; q < order.size(); ++q) {
    stats[order[q]] = row_max[q];
    stats[n + order[q]] = row_sum[q];
  }
  pull_to_positives(prepared, sums, count, stats, loss, direction, threads);
  give_back_own(prepared, count, share, key_direction);
}

template void infonce_forward_both<float>(const InfoNCEProblem<float>&, float*, int64_t*, double*, float*,
                                          float*, const Threads&);
template void infonce_forward_both<double>(const InfoNCEProblem<double>&, double*, int64_t*, double*, double*,
                                           double*, const Threads&);

}  // namespace wscl
