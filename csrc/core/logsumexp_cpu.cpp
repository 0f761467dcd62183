// The passes of logsumexp.h.

#include <algorithm>
#include <cmath>
#include <vector>

#include "logsumexp.h"
#include "similarity.h"

namespace wscl {
template <class In>
void logsumexp_forward(const PairsProblem<In>& p, Compute<In>* lse, double* shift, double* sum,
                       Compute<In>* mean, const Threads& threads) {
  using T = Compute<In>;
  const Meeting meeting = meeting_of(p, nullptr, false, threads);
  const std::vector<int64_t>& order = meeting.queries;
  std::fill(shift, shift + p.n, -kInfinity);
  std::fill(sum, sum + p.n, 0.0);
  if (mean && static_cast<int64_t>(order.size()) != p.n) std::fill(mean, mean + p.n * p.d, T(0));
  std::vector<double> row_max(order.size()), row_sum(order.size());
  SimilarityParams<In> pass = pass_of(p, meeting);
  pass.output = mean;
  pass.row_max = row_max.data();
  pass.row_sum = row_sum.data();
  run_similarity(pass, threads);
  for (size_t r = 0; r < order.size(); ++r) {
    if (row_sum[r] == 0) continue;
    shift[order[r]] = row_max[r];
    sum[order[r]] = row_sum[r];
  }
  for (int64_t i = 0; i < p.n; ++i) lse[i] = static_cast<T>((shift[i] + std::log2(sum[i])) / kLog2E);
}

template <class In>
void logsumexp_key_gradient(const PairsProblem<In>& p, const Compute<In>* grad, const double* shift,
                            const double* sum, In* grad_keys, const Threads& threads) {
  using T = Compute<In>;
  std::vector<int64_t> meets_any(p.n);
  for (int64_t i = 0; i < p.n; ++i) meets_any[i] = sum[i] != 0;
  const Meeting meeting = meeting_of(p, meets_any.data(), true, threads);
  const std::vector<int64_t>& order = meeting.queries;
  if (meeting.key_count != p.m) std::fill(grad_keys, grad_keys + p.m * p.d, In{});
  std::vector<T> column_shift(order.size()), column_weight(order.size());
  for (size_t c = 0; c < order.size(); ++c) {
    column_shift[c] = static_cast<T>(shift[order[c]]);
    column_weight[c] = static_cast<T>(grad[order[c]] / sum[order[c]]);
  }
  SimilarityParams<In> pass = pass_of(p, meeting);
  pass.narrow_output = grad_keys;
  pass.epilogue = Epilogue::kColumns;
  pass.alpha = static_cast<T>(p.scale);
  pass.column_shift = column_shift.data();
  pass.column_weight = column_weight.data();
  run_similarity(pass, threads);
}

#define WSCL_INSTANTIATE(In)                                                                                 \
  template void logsumexp_forward<In>(const PairsProblem<In>&, Compute<In>*, double*, double*, Compute<In>*, \
                                      const Threads&);                                                       \
  template void logsumexp_key_gradient<In>(const PairsProblem<In>&, const Compute<In>*, const double*,       \
                                           const double*, In*, const Threads&);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
