// logsumexp and logsumexp_backward on CPU tensors: checks, allocation, dispatch on dtype.

#include "../core/logsumexp.h"

#include <optional>
#include <tuple>

#include "gradient.h"
#include "pairs.h"

namespace {

using namespace wscl::binding;

std::tuple<Tensor, Tensor, Tensor> logsumexp(const Tensor& queries, const Tensor& keys,
                                             const std::optional<Tensor>& query_ids,
                                             const std::optional<Tensor>& key_ids,
                                             const std::optional<Tensor>& own, const Tensor& scale,
                                             int64_t meets, int64_t ignore_index, bool need_mean,
                                             bool /*allow_tf32*/) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0), d = queries.size(1);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  Tensor lse = torch::stable::new_empty(queries, {n}, dtype);
  Tensor stats = torch::stable::new_empty(queries, {2, n}, ScalarType::Double);
  Tensor mean = torch::stable::new_empty(queries, {need_mean ? n : 0, d}, dtype);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::logsumexp_forward<In>(arguments.problem<In>(), data<T>(lse), data<double>(stats),
                                data<double>(stats) + n, need_mean ? data<T>(mean) : nullptr, torch_threads());
  });
  return {lse, stats, mean};
}

Tensor logsumexp_key_gradient(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                              const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
                              const std::optional<Tensor>& own, const Tensor& scale, int64_t meets,
                              int64_t ignore_index, const Tensor& stats, bool /*allow_tf32*/) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0);
  const Tensor upstream = check_vector("grad", grad, n, compute_dtype(queries.scalar_type()));
  const Tensor softmax = check_stats("stats", stats, n);
  Tensor grad_keys = new_gradient(queries, keys.size(0), keys.size(1), queries.scalar_type());
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::logsumexp_key_gradient<In>(arguments.problem<In>(), data<T>(upstream), data<double>(softmax),
                                     data<double>(softmax) + n, data<In>(grad_keys), torch_threads());
  });
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_key_gradient", TORCH_BOX(&logsumexp_key_gradient));
}
