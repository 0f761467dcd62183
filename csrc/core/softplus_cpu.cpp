// The passes of softplus.h.

#include "softplus.h"

#include <algorithm>
#include <vector>

namespace wscl {

template <class In>
void softplus_forward(const PairsProblem<In>& p, const Compute<In>* offset, Compute<In>* sum,
                      Compute<In>* slope, Compute<In>* direction, const Threads& threads) {
  using T = Compute<In>;
  const Meeting meeting = meeting_of(p, nullptr, false, threads);
  const std::vector<int64_t>& order = meeting.queries;
  const int64_t rows = static_cast<int64_t>(order.size());
  std::fill(sum, sum + p.n, T(0));
  std::fill(slope, slope + p.n, T(0));
  if (direction && rows != p.n) std::fill(direction, direction + p.n * p.d, T(0));
  std::vector<double> slopes(rows), sums(rows);
  std::vector<T> shift(rows);
  for (int64_t r = 0; r < rows; ++r) shift[r] = static_cast<T>(offset[order[r]] * kLog2E);
  SimilarityParams<In> pass = pass_of(p, meeting);
  pass.epilogue = Epilogue::kSoftplus;
  pass.row_shift = shift.data();
  pass.row_max = slopes.data();
  pass.row_sum = sums.data();
  pass.output = direction;
  run_similarity(pass, threads);
  for (int64_t r = 0; r < rows; ++r) {
    sum[order[r]] = static_cast<T>(sums[r]);
    slope[order[r]] = static_cast<T>(slopes[r]);
  }
}

template <class In>
void softplus_key_gradient(const PairsProblem<In>& p, const Compute<In>* offset, const Compute<In>* grad,
                           In* grad_keys, const Threads& threads) {
  using T = Compute<In>;
  const Meeting meeting = meeting_of(p, nullptr, true, threads);
  const std::vector<int64_t>& order = meeting.queries;
  if (meeting.key_count != p.m) std::fill(grad_keys, grad_keys + p.m * p.d, In{});
  std::vector<T> shift(order.size()), weight(order.size());
  for (size_t c = 0; c < order.size(); ++c) {
    shift[c] = static_cast<T>(offset[order[c]] * kLog2E);
    weight[c] = grad[order[c]];
  }
  SimilarityParams<In> pass = pass_of(p, meeting);
  pass.epilogue = Epilogue::kSigmoid;
  pass.column_shift = shift.data();
  pass.column_weight = weight.data();
  pass.alpha = static_cast<T>(p.scale);
  pass.narrow_output = grad_keys;
  run_similarity(pass, threads);
}

#define WSCL_INSTANTIATE(In)                                                                                  \
  template void softplus_forward<In>(const PairsProblem<In>&, const Compute<In>*, Compute<In>*, Compute<In>*, \
                                     Compute<In>*, const Threads&);                                           \
  template void softplus_key_gradient<In>(const PairsProblem<In>&, const Compute<In>*, const Compute<In>*,    \
                                          In*, const Threads&);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
