// The passes of two_way.h.

#include "two_way.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "softmax_weights.h"

namespace wscl {
namespace {

template <class T>
void clear(const Direction<T, double>& side, int64_t size) {
  std::fill(side.lse_or_grad, side.lse_or_grad + size, static_cast<T>(-kInfinity));
  std::fill(side.shift, side.shift + size, -kInfinity);
  std::fill(side.sum, side.sum + size, 0.0);
}

// What was found by position goes to where it belongs.
template <class In, class T>
void scatter(const Rows<In>& rows, const std::vector<double>& max, const std::vector<double>& sum,
             const Direction<T, double>& side) {
  for (int64_t p = 0; p < rows.count; ++p) {
    if (sum[p] == 0) continue;
    const int64_t i = rows.origin(p);
    side.shift[i] = max[p];
    side.sum[i] = sum[p];
    side.lse_or_grad[i] = static_cast<T>((max[p] + std::log2(sum[p])) / kLog2E);
  }
}

template <class In, class T>
std::vector<Softmax> softmaxes(const Rows<In>& rows, const Direction<const T, const double>& side) {
  std::vector<Softmax> found(rows.count);
  for (int64_t p = 0; p < rows.count; ++p) {
    const int64_t i = rows.origin(p);
    found[p] = {side.shift[i], side.sum[i], static_cast<double>(side.lse_or_grad[i])};
  }
  return found;
}

}  // namespace

template <class In>
void two_way_forward(const PairsProblem<In>& p, const Direction<Compute<In>, double>& rows,
                     const Direction<Compute<In>, double>& columns, const Threads& threads,
                     KeptLogits<Compute<In>> room) {
  clear(rows, p.n);
  clear(columns, p.m);
  const bool keys_are_rows = p.m < p.n;  // the threads share the columns, so those are the many
  const Meeting meeting = meeting_of(p, nullptr, keys_are_rows, threads);
  SimilarityParams<In> pass = pass_of(p, meeting);
  std::vector<double> row_max(pass.x.count), row_sum(pass.x.count);
  std::vector<double> column_max(pass.y.count, -kInfinity), column_sum(pass.y.count, 0.0);
  pass.epilogue = Epilogue::kTwoWay;
  pass.logits = room;
  pass.row_max = row_max.data();
  pass.row_sum = row_sum.data();
  pass.column_max = column_max.data();
  pass.column_sum = column_sum.data();
  if (pass.y.count > 0) run_similarity(pass, threads);
  scatter(pass.x, row_max, row_sum, keys_are_rows ? columns : rows);
  scatter(pass.y, column_max, column_sum, keys_are_rows ? rows : columns);
}

template <class In>
void two_way_backward(const PairsProblem<In>& p, const Direction<const Compute<In>, const double>& rows,
                      const Direction<const Compute<In>, const double>& columns, Compute<In>* grad_queries,
                      Compute<In>* grad_keys, const Threads& threads, KeptLogits<Compute<In>> room) {
  using T = Compute<In>;
  const bool keys_are_rows = grad_queries && grad_keys ? p.m < p.n : !grad_queries;
  if (grad_queries) std::fill(grad_queries, grad_queries + p.n * p.d, T(0));
  if (grad_keys) std::fill(grad_keys, grad_keys + p.m * p.d, T(0));
  const Meeting meeting = meeting_of(p, nullptr, keys_are_rows, threads);
  SimilarityParams<In> pass = pass_of(p, meeting);
  if (pass.x.count == 0 || pass.y.count == 0) return;
  const std::vector<Softmax> of_x = softmaxes(pass.x, keys_are_rows ? columns : rows);
  const std::vector<Softmax> of_y = softmaxes(pass.y, keys_are_rows ? rows : columns);
  T common = 0;
  const T* const shared = find_common_shift<T>({&of_x, &of_y}, &common) ? &common : nullptr;
  const SoftmaxWeights<T> row_weights(of_x, shared), column_weights(of_y, shared);
  set_softmaxes(pass, row_weights, column_weights, shared);
  if (grad_queries && grad_keys) pass.logits = room;
  pass.logits_known = true;
  pass.alpha = static_cast<T>(p.scale);
  pass.output = keys_are_rows ? grad_keys : grad_queries;
  pass.column_output = keys_are_rows ? grad_queries : grad_keys;
  pass.column_output_stride = p.d;
  run_similarity(pass, threads);
}

#define WSCL_INSTANTIATE(In)                                                                          \
  template void two_way_forward<In>(const PairsProblem<In>&, const Direction<Compute<In>, double>&,   \
                                    const Direction<Compute<In>, double>&, const Threads&,            \
                                    KeptLogits<Compute<In>>);                                         \
  template void two_way_backward<In>(const PairsProblem<In>&,                                         \
                                     const Direction<const Compute<In>, const double>&,               \
                                     const Direction<const Compute<In>, const double>&, Compute<In>*, \
                                     Compute<In>*, const Threads&, KeptLogits<Compute<In>>);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
