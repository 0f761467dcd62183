// infonce_forward and infonce_backward on CPU tensors: checks, allocation, dispatch on dtype.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../core/infonce.h"
#include "gradient.h"
#include "room.h"
#include "tensors.h"

namespace {

using namespace wscl::binding;

// The arguments, checked and made contiguous where the kernels need it; holds what the problem points to.
struct Arguments {
  Tensor queries;
  std::optional<Tensor> keys;
  Tensor query_clusters;
  std::optional<Tensor> key_clusters, own;
  double scale;
  bool exclude_self, inner;
  int64_t ignore_index;

  Arguments(const Tensor& queries_, const std::optional<Tensor>& keys_, const Tensor& query_clusters_,
            const std::optional<Tensor>& key_clusters_, const std::optional<Tensor>& own_, double scale_,
            bool exclude_self_, bool inner_, int64_t ignore_index_)
      : queries(check_matrix("queries", queries_, queries_.scalar_type())),
        query_clusters(check_vector("query_clusters", query_clusters_, queries_.size(0), ScalarType::Long)),
        scale(scale_),
        exclude_self(exclude_self_),
        inner(inner_),
        ignore_index(ignore_index_) {
    STD_TORCH_CHECK(keys_.has_value() == key_clusters_.has_value(), "keys and key_clusters go together");
    STD_TORCH_CHECK(keys_.has_value() || !own_.has_value(), "own: expected none where keys is none");
    if (keys_) {
      keys = check_matrix("keys", *keys_, queries.scalar_type());
      STD_TORCH_CHECK(keys->size(1) == queries.size(1), "keys: expected ", queries.size(1), " columns, got ",
                      keys->size(1));
      key_clusters = check_vector("key_clusters", *key_clusters_, keys->size(0), ScalarType::Long);
    }
    if (own_) own = check_vector("own", *own_, queries.size(0), ScalarType::Long);
  }

  Arguments(const Tensor& queries_, const std::optional<Tensor>& keys_, const Tensor& query_clusters_,
            const std::optional<Tensor>& key_clusters_, const std::optional<Tensor>& own_, const Tensor& scale_,
            bool exclude_self_, bool inner_, int64_t ignore_index_)
      : Arguments(queries_, keys_, query_clusters_, key_clusters_, own_,
                  check_scale(scale_, queries_.scalar_type()), exclude_self_, inner_, ignore_index_) {}

  template <class In>
  wscl::InfoNCEProblem<In> problem() const {
    wscl::InfoNCEProblem<In> p;
    p.queries = data<In>(queries);
    p.query_stride = queries.stride(0);
    p.n = queries.size(0);
    p.keys = keys ? data<In>(*keys) : nullptr;
    p.key_stride = keys ? keys->stride(0) : 0;
    p.m = keys ? keys->size(0) : p.n;
    p.d = queries.size(1);
    p.query_clusters = data<int64_t>(query_clusters);
    p.key_clusters = keys ? data<int64_t>(*key_clusters) : nullptr;
    p.own = own ? data<int64_t>(*own) : nullptr;
    p.exclude_self = exclude_self;
    p.inner = inner;
    p.ignore_index = ignore_index;
    p.scale = scale;
    return p;
  }
};

// What the forward pass left for the backward pass, checked.
struct Saved {
  ScalarType dtype;
  Tensor upstream, count, stats;

  Saved(const Tensor& grad_loss, const Tensor& count_, const Tensor& stats_, const Tensor& queries, bool inner)
      : dtype(compute_dtype(queries.scalar_type())),
        upstream(check_vector("grad_loss", grad_loss, queries.size(0), dtype)),
        count(check_vector("count", count_, queries.size(0), ScalarType::Long)),
        stats(torch::stable::contiguous(stats_)) {
    STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == wscl::infonce_stats(inner) &&
                        stats.size(1) == queries.size(0) && stats.scalar_type() == ScalarType::Double,
                    "stats: expected the forward pass's");
  }
};

// Keys of no numbers at all are given a pointer that says "keys" rather than "the queries are the keys".
template <class In>
void mark_empty_keys(wscl::InfoNCEProblem<In>& p, const Arguments& arguments) {
  static const In nothing{};
  static const int64_t no_cluster{};
  if (!arguments.keys) return;
  if (!p.keys) p.keys = &nothing;
  if (!p.key_clusters) p.key_clusters = &no_cluster;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_forward(
    const Tensor& queries, const std::optional<Tensor>& keys, const Tensor& query_clusters,
    const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own, const Tensor& scale,
    bool exclude_self, bool inner, int64_t ignore_index, bool need_direction, bool /*allow_tf32*/) {
  const Arguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                            ignore_index);
  const int64_t n = queries.size(0), d = queries.size(1);
  const bool with_direction = need_direction && keys.has_value();
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  Tensor loss = torch::stable::new_empty(queries, {n}, dtype);
  Tensor count = torch::stable::new_empty(queries, {n}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(queries, {wscl::infonce_stats(inner), n}, ScalarType::Double);
  Tensor direction = torch::stable::new_empty(queries, {with_direction ? n : 0, d}, dtype);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    auto problem = arguments.problem<In>();
    mark_empty_keys(problem, arguments);
    wscl::infonce_forward<In>(problem, data<T>(loss), data<int64_t>(count), data<double>(stats),
                              with_direction ? data<T>(direction) : nullptr, torch_threads());
  });
  return {loss, count, stats, direction};
}

// The mean of the losses over the queries that have a positive, or their sum, and its gradients: what a
// backward pass multiplies by a number. Without a tensor of the scale it is the number beside it. Where queries
// are the keys, their logits have `room` numbers of memory in between.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> infonce_reduced(
    const Tensor& queries, const std::optional<Tensor>& keys, const Tensor& query_clusters,
    const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const std::optional<Tensor>& scale, double constant_scale, bool exclude_self, bool inner,
    int64_t ignore_index, bool mean, bool need_queries, bool need_keys, bool need_scale, int64_t room) {
  const double factor = scale ? check_scale(*scale, queries.scalar_type()) : constant_scale;
  STD_TORCH_CHECK(factor > 0, "constant_scale: expected a number above 0, got ", factor);
  const Arguments arguments(queries, keys, query_clusters, key_clusters, own, factor, exclude_self, inner,
                            ignore_index);
  const int64_t n = queries.size(0), d = queries.size(1);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  STD_TORCH_CHECK(!need_keys || (keys && !inner && dtype == queries.scalar_type()),
                  "need_keys: expected keys of float32 or float64, and inner=False");
  STD_TORCH_CHECK(need_queries || !(need_keys || need_scale), "need_queries: expected with other gradients");
  Tensor loss = torch::stable::new_empty(queries, {}, dtype);
  Tensor count = torch::stable::new_empty(queries, {n}, ScalarType::Long);
  Tensor grad_queries = new_gradient(queries, need_queries ? n : 0, d, dtype);
  Tensor grad_keys = new_gradient(queries, need_keys ? keys->size(0) : 0, d, queries.scalar_type());
  Tensor grad_scale = torch::stable::new_empty(queries, {}, dtype);
  const Tensor logits = new_room(queries, room);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    auto problem = arguments.problem<In>();
    mark_empty_keys(problem, arguments);
    double to_scale = 0;
    const double reduced = wscl::infonce_reduced<In>(
        problem, mean, data<int64_t>(count), need_queries ? data<T>(grad_queries) : nullptr,
        need_keys ? data<In>(grad_keys) : nullptr, need_scale ? &to_scale : nullptr, torch_threads(),
        kept<T>(logits));
    *data<T>(loss) = static_cast<T>(reduced);
    *data<T>(grad_scale) = static_cast<T>(to_scale);
  });
  return {loss, count, grad_queries, grad_keys, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> infonce_backward(
    const Tensor& grad_loss, const Tensor& queries, const std::optional<Tensor>& keys,
    const Tensor& query_clusters, const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const Tensor& scale, bool exclude_self, bool inner, int64_t ignore_index, const Tensor& count,
    const Tensor& stats, const Tensor& direction, bool need_queries, bool need_keys, bool need_scale,
    bool /*allow_tf32*/) {
  const Arguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                            ignore_index);
  const int64_t n = queries.size(0), d = queries.size(1), m = keys ? keys->size(0) : 0;
  const Saved saved(grad_loss, count, stats, queries, inner);
  const ScalarType dtype = saved.dtype;
  const Tensor directions = torch::stable::contiguous(direction);
  STD_TORCH_CHECK(
      !keys || !(need_queries || need_scale) || (directions.size(0) == n && directions.scalar_type() == dtype),
      "direction: expected the forward pass's with need_direction");
  // Where the queries are the keys, the gradient of the scale is read off that of the queries.
  const bool queries_too = need_queries || (!keys && need_scale);
  const bool keys_too = keys && need_keys;
  Tensor grad_queries = new_gradient(queries, queries_too ? n : 0, d, dtype);
  Tensor grad_keys = new_gradient(queries, keys_too ? m : 0, d, queries.scalar_type());
  Tensor grad_scale = torch::stable::new_zeros(scale, {});
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    auto problem = arguments.problem<In>();
    mark_empty_keys(problem, arguments);
    double to_scale = 0;
    if (n > 0 && (queries_too || keys_too || need_scale))
      wscl::infonce_backward<In>(
          problem, data<T>(saved.upstream), data<int64_t>(saved.count), data<double>(saved.stats),
          data<T>(directions), queries_too ? data<T>(grad_queries) : nullptr,
          keys_too ? data<In>(grad_keys) : nullptr, need_scale ? &to_scale : nullptr, torch_threads());
    else if (keys_too)
      torch::stable::zero_(grad_keys);
    *data<T>(grad_scale) = static_cast<T>(to_scale);
  });
  return {grad_queries, grad_keys, grad_scale};
}

// The queries are the keys. The logits stay, as far as `room` numbers go, for the backward pass.
std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_forward_in_batch(const Tensor& queries,
                                                                    const Tensor& clusters, const Tensor& scale,
                                                                    bool exclude_self, bool inner,
                                                                    int64_t ignore_index, int64_t room) {
  const Arguments arguments(queries, std::nullopt, clusters, std::nullopt, std::nullopt, scale, exclude_self,
                            inner, ignore_index);
  const int64_t n = queries.size(0);
  const ScalarType dtype = compute_dtype(queries.scalar_type());
  Tensor loss = torch::stable::new_empty(queries, {n}, dtype);
  Tensor count = torch::stable::new_empty(queries, {n}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(queries, {wscl::infonce_stats(inner), n}, ScalarType::Double);
  Tensor logits = new_room(queries, room);
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    wscl::infonce_forward<In>(arguments.problem<In>(), data<T>(loss), data<int64_t>(count), data<double>(stats),
                              nullptr, torch_threads(), kept<T>(logits));
  });
  return {loss, count, stats, logits};
}

std::tuple<Tensor, Tensor> infonce_backward_in_batch(const Tensor& grad_loss, const Tensor& queries,
                                                     const Tensor& clusters, const Tensor& scale,
                                                     bool exclude_self, bool inner, int64_t ignore_index,
                                                     const Tensor& count, const Tensor& stats,
                                                     const Tensor& logits) {
  const Arguments arguments(queries, std::nullopt, clusters, std::nullopt, std::nullopt, scale, exclude_self,
                            inner, ignore_index);
  const Saved saved(grad_loss, count, stats, queries, inner);
  check_room(logits, queries);
  Tensor grad_queries = new_gradient(queries, queries.size(0), queries.size(1), saved.dtype);
  Tensor grad_scale = torch::stable::new_zeros(scale, {});
  dispatch_rows(queries.scalar_type(), [&](auto zero) {
    using In = decltype(zero);
    using T = wscl::Compute<In>;
    double to_scale = 0;
    if (queries.size(0) > 0)
      wscl::infonce_backward<In>(arguments.problem<In>(), data<T>(saved.upstream), data<int64_t>(saved.count),
                                 data<double>(saved.stats), nullptr, data<T>(grad_queries), nullptr, &to_scale,
                                 torch_threads(), kept<T>(logits));
    *data<T>(grad_scale) = static_cast<T>(to_scale);
  });
  return {grad_queries, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("infonce_forward", TORCH_BOX(&infonce_forward));
  m.impl("infonce_reduced", TORCH_BOX(&infonce_reduced));
  m.impl("infonce_forward_in_batch", TORCH_BOX(&infonce_forward_in_batch));
  m.impl("infonce_backward_in_batch", TORCH_BOX(&infonce_backward_in_batch));
  m.impl("infonce_backward", TORCH_BOX(&infonce_backward));
}
