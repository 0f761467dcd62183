// logsumexp and logsumexp_backward on CPU tensors: checks, allocation, dispatch on dtype.

#include "../core/logsumexp.h"

#include <optional>
#include <tuple>

#include "tensors.h"

namespace {

using namespace wscl::binding;

// The arguments, checked and made contiguous where the kernels need it; holds what the problem points to.
struct Arguments {
  Tensor queries, keys;
  std::optional<Tensor> query_ids, key_ids, own;
  double scale;
  wscl::Meets meets;
  int64_t ignore_index;

  Arguments(const Tensor& queries_, const Tensor& keys_, const std::optional<Tensor>& query_ids_,
            const std::optional<Tensor>& key_ids_, const std::optional<Tensor>& own_, const Tensor& scale_,
            int64_t meets_, int64_t ignore_index_)
      : queries(check_matrix("queries", queries_, queries_.scalar_type())),
        keys(check_matrix("keys", keys_, queries_.scalar_type())),
        scale(check_scale(scale_, queries_.scalar_type())),
        meets(static_cast<wscl::Meets>(meets_)),
        ignore_index(ignore_index_) {
    STD_TORCH_CHECK(keys.size(1) == queries.size(1), "keys: expected ", queries.size(1), " columns, got ",
                    keys.size(1));
    STD_TORCH_CHECK(meets_ >= 0 && meets_ <= 2, "meets: expected 0 (all), 1 (same) or 2 (other), got ", meets_);
    STD_TORCH_CHECK(meets_ == 0 || (query_ids_ && key_ids_),
                    "meets: 'same' and 'other' need query_ids and key_ids");
    if (query_ids_) query_ids = check_vector("query_ids", *query_ids_, queries.size(0), ScalarType::Long);
    if (key_ids_) key_ids = check_vector("key_ids", *key_ids_, keys.size(0), ScalarType::Long);
    if (own_) own = check_vector("own", *own_, queries.size(0), ScalarType::Long);
  }

  template <class In>
  wscl::LogSumExpProblem<In> problem() const {
    wscl::LogSumExpProblem<In> p;
    p.queries = data<In>(queries);
    p.query_stride = queries.stride(0);
    p.n = queries.size(0);
    p.keys = data<In>(keys);
    p.key_stride = keys.stride(0);
    p.m = keys.size(0);
    p.d = queries.size(1);
    p.query_clusters = query_ids ? data<int64_t>(*query_ids) : nullptr;
    p.key_clusters = key_ids ? data<int64_t>(*key_ids) : nullptr;
    p.own = own ? data<int64_t>(*own) : nullptr;
    p.meets = meets;
    p.ignore_index = ignore_index;
    p.scale = scale;
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> logsumexp(const Tensor& queries, const Tensor& keys,
                                             const std::optional<Tensor>& query_ids,
                                             const std::optional<Tensor>& key_ids,
                                             const std::optional<Tensor>& own, const Tensor& scale,
                                             int64_t meets, int64_t ignore_index, bool need_mean) {
  const Arguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
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
                              int64_t ignore_index, const Tensor& stats) {
  const Arguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0);
  const Tensor upstream = check_vector("grad", grad, n, compute_dtype(queries.scalar_type()));
  const Tensor softmax = torch::stable::contiguous(stats);
  STD_TORCH_CHECK(softmax.dim() == 2 && softmax.size(0) == 2 && softmax.size(1) == n &&
                      softmax.scalar_type() == ScalarType::Double,
                  "stats: expected a float64 tensor [2, ", n, "]");
  Tensor grad_keys = torch::stable::new_empty(queries, {keys.size(0), keys.size(1)});
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
