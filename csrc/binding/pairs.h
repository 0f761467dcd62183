// The arguments that the operators over pairs of queries and keys share.
#pragma once

#include <optional>

#include "../core/pairs_problem.h"
#include "tensors.h"

namespace wscl::binding {

// The arguments, checked and made contiguous where the kernels need it; holds what the problem points to.
struct PairsArguments {
  Tensor queries, keys;
  std::optional<Tensor> query_ids, key_ids, own;
  double scale;
  wscl::Meets meets;
  int64_t ignore_index;

  PairsArguments(const Tensor& queries_, const Tensor& keys_, const std::optional<Tensor>& query_ids_,
                 const std::optional<Tensor>& key_ids_, const std::optional<Tensor>& own_, const Tensor& scale_,
                 int64_t meets_, int64_t ignore_index_, bool either_sign = false)
      : queries(check_matrix("queries", queries_, queries_.scalar_type())),
        keys(check_matrix("keys", keys_, queries_.scalar_type())),
        scale(check_scale(scale_, queries_.scalar_type(), either_sign)),
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
  wscl::PairsProblem<In> problem() const {
    wscl::PairsProblem<In> p;
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

// A forward pass's statistics [2, rows], shift and sum.
inline Tensor check_stats(const char* name, const Tensor& stats, int64_t rows) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == rows &&
                      stats.scalar_type() == ScalarType::Double,
                  name, ": expected a float64 tensor [2, ", rows, "]");
  return torch::stable::contiguous(stats);
}

}  // namespace wscl::binding
