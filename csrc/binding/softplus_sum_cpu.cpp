// softplus_sum and softplus_sum_key_gradient on CPU tensors: checks, allocation, dispatch on dtype.

#include "../core/softplus.h"

#include <optional>
#include <tuple>

#include "gradient.h"
#include "pairs.h"

namespace {

using namespace wscl::binding;

std::tuple<Tensor, Tensor, Tensor> softplus_sum(const Tensor& queries, const Tensor& keys,
                                                const std::optional<Tensor>& query_ids,
                                                const std::optional<Tensor>& key_ids,
                                                const std::optional<Tensor>& own, const Tensor& scale,
                                                const Tensor& offset, int64_t meets, int64_t ignore_index,
                                                bool need_direction, bool /*allow_tf32*/) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, true);
  const int64_t n = queries.size(0), d = queries.size(1);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  const Tensor offsets = check_vector("offset", offset, n, dtype);
  Tensor sum = torch::stable::new_empty(queries, {n}, dtype);
  Tensor slope = torch::stable::new_empty(queries, {n}, dtype);
  Tensor direction = torch::stable::new_empty(queries, {need_direction ? n : 0, d}, dtype);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::softplus_forward<In>(arguments.problem<In>(), data<T>(offsets), data<T>(sum), data<T>(slope),
                               need_direction ? data<T>(direction) : nullptr, torch_threads());
  });
  return {sum, slope, direction};
}

Tensor softplus_sum_key_gradient(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                 const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
                                 const std::optional<Tensor>& own, const Tensor& scale, const Tensor& offset,
                                 int64_t meets, int64_t ignore_index, bool /*allow_tf32*/) {
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, true);
  const int64_t n = queries.size(0);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  const Tensor upstream = check_vector("grad", grad, n, dtype);
  const Tensor offsets = check_vector("offset", offset, n, dtype);
  Tensor grad_keys = new_gradient(queries, keys.size(0), keys.size(1), queries.scalar_type());
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::softplus_key_gradient<In>(arguments.problem<In>(), data<T>(offsets), data<T>(upstream),
                                    data<In>(grad_keys), torch_threads());
  });
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("softplus_sum", TORCH_BOX(&softplus_sum));
  m.impl("softplus_sum_key_gradient", TORCH_BOX(&softplus_sum_key_gradient));
}
