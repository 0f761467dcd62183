// two_way_logsumexp and two_way_logsumexp_backward on CPU tensors: checks, allocation, dispatch on dtype.

#include "../core/two_way.h"

#include <optional>
#include <tuple>

#include "gradient.h"
#include "pairs.h"
#include "room.h"

namespace {

using namespace wscl::binding;

using Optional = std::optional<Tensor>;

// The logits stay, as far as `room` numbers go, for the backward pass.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> two_way_logsumexp_with_room(
    const Tensor& queries, const Tensor& keys, const Optional& query_ids, const Optional& key_ids,
    const Optional& own, const Tensor& scale, int64_t meets, int64_t ignore_index, int64_t room) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0), m = keys.size(0);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  Tensor row_lse = torch::stable::new_empty(queries, {n}, dtype);
  Tensor column_lse = torch::stable::new_empty(queries, {m}, dtype);
  Tensor row_stats = torch::stable::new_empty(queries, {2, n}, ScalarType::Double);
  Tensor column_stats = torch::stable::new_empty(queries, {2, m}, ScalarType::Double);
  Tensor logits = new_room(queries, room);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::two_way_forward<In>(arguments.problem<In>(),
                              {data<T>(row_lse), data<double>(row_stats), data<double>(row_stats) + n},
                              {data<T>(column_lse), data<double>(column_stats), data<double>(column_stats) + m},
                              torch_threads(), kept<T>(logits));
  });
  return {row_lse, column_lse, row_stats, column_stats, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> two_way_logsumexp(const Tensor& queries, const Tensor& keys,
                                                             const Optional& query_ids, const Optional& key_ids,
                                                             const Optional& own, const Tensor& scale,
                                                             int64_t meets, int64_t ignore_index,
                                                             bool /*allow_tf32*/) {
  const auto [row_lse, column_lse, row_stats, column_stats, logits] =
      two_way_logsumexp_with_room(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, 0);
  return {row_lse, column_lse, row_stats, column_stats};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor& grad_columns, const Tensor& queries,
                                    const Tensor& keys, const Optional& query_ids, const Optional& key_ids,
                                    const Optional& own, const Tensor& scale, int64_t meets,
                                    int64_t ignore_index, const Tensor& row_stats, const Tensor& column_stats,
                                    const Tensor* logits, bool need_queries, bool need_keys) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0), m = keys.size(0), d = queries.size(1);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  const Tensor of_rows = check_vector("grad_rows", grad_rows, n, dtype);
  const Tensor of_columns = check_vector("grad_columns", grad_columns, m, dtype);
  const Tensor rows = check_stats("row_stats", row_stats, n);
  const Tensor columns = check_stats("column_stats", column_stats, m);
  if (logits) check_room(*logits, queries);
  Tensor grad_queries = new_gradient(queries, need_queries ? n : 0, d, dtype);
  Tensor grad_keys = new_gradient(queries, need_keys ? m : 0, d, dtype);
  if (!need_queries && !need_keys) return {grad_queries, grad_keys};
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::two_way_backward<In>(
        arguments.problem<In>(), {data<T>(of_rows), data<double>(rows), data<double>(rows) + n},
        {data<T>(of_columns), data<double>(columns), data<double>(columns) + m},
        need_queries ? data<T>(grad_queries) : nullptr, need_keys ? data<T>(grad_keys) : nullptr,
        torch_threads(), logits ? kept<T>(*logits) : wscl::KeptLogits<T>{});
  });
  return {grad_queries, grad_keys};
}

std::tuple<Tensor, Tensor> two_way_logsumexp_backward(const Tensor& grad_rows, const Tensor& grad_columns,
                                                      const Tensor& queries, const Tensor& keys,
                                                      const Optional& query_ids, const Optional& key_ids,
                                                      const Optional& own, const Tensor& scale, int64_t meets,
                                                      int64_t ignore_index, const Tensor& row_stats,
                                                      const Tensor& column_stats, bool need_queries,
                                                      bool need_keys, bool /*allow_tf32*/) {
  return backward(grad_rows, grad_columns, queries, keys, query_ids, key_ids, own, scale, meets, ignore_index,
                  row_stats, column_stats, nullptr, need_queries, need_keys);
}

std::tuple<Tensor, Tensor> two_way_logsumexp_with_room_backward(
    const Tensor& grad_rows, const Tensor& grad_columns, const Tensor& queries, const Tensor& keys,
    const Optional& query_ids, const Optional& key_ids, const Optional& own, const Tensor& scale, int64_t meets,
    int64_t ignore_index, const Tensor& row_stats, const Tensor& column_stats, const Tensor& logits) {
  return backward(grad_rows, grad_columns, queries, keys, query_ids, key_ids, own, scale, meets, ignore_index,
                  row_stats, column_stats, &logits, true, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("two_way_logsumexp", TORCH_BOX(&two_way_logsumexp));
  m.impl("two_way_logsumexp_with_room", TORCH_BOX(&two_way_logsumexp_with_room));
  m.impl("two_way_logsumexp_with_room_backward", TORCH_BOX(&two_way_logsumexp_with_room_backward));
  m.impl("two_way_logsumexp_backward", TORCH_BOX(&two_way_logsumexp_backward));
}
