// Operators over pairs on CUDA tensors: logsumexp, two_way_logsumexp, softplus_sum and their gradients. Checks,
// allocation, the sort of the ids where ids decide who meets whom; enqueued on the current stream, as in
// infonce_cuda.cpp.

#include "../core/pairs_cuda.h"

#include <tuple>

#include "arguments_cuda.h"

namespace {

using namespace wscl::binding;
using wscl::cuda::Meets;

struct PairsArguments : CudaArguments {
  wscl::cuda::PairsProblem pass;

  PairsArguments(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& query_ids,
                 const std::optional<Tensor>& key_ids, const std::optional<Tensor>& own, const Tensor& scale,
                 int64_t meets, int64_t ignore_index, bool allow_tf32, cudaStream_t stream)
      : CudaArguments(queries, keys, query_ids, key_ids, own, scale, false, meets != 0, ignore_index,
                      allow_tf32) {
    STD_TORCH_CHECK(meets >= 0 && meets <= 2, "meets: expected 0 (all), 1 (same) or 2 (other), got ", meets);
    STD_TORCH_CHECK(meets == 0 || (query_ids && key_ids),
                    "meets: 'same' and 'other' need query_ids and key_ids");
    if (meets != 0) sort(stream);
    pass = {problem, static_cast<Meets>(meets)};
  }

  // A gradient of keys in their own dtype.
  Tensor empty_keys() const {
    return empty({problem.m, problem.d}, queries.scalar_type());
  }
  void* keys_data(const Tensor& like_keys) const {
    return device_data<void>(like_keys, wscl::cuda::element_size(problem.precision));
  }
};

Tensor check_stats(const char* name, const Tensor& stats, int64_t count) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == count &&
                      stats.scalar_type() == ScalarType::Double,
                  name, ": expected a float64 tensor [2, ", count, "]");
  return torch::stable::contiguous(stats);
}

std::tuple<Tensor, Tensor, Tensor> logsumexp(const Tensor& queries, const Tensor& keys,
                                             const std::optional<Tensor>& query_ids,
                                             const std::optional<Tensor>& key_ids,
                                             const std::optional<Tensor>& own, const Tensor& scale,
                                             int64_t meets, int64_t ignore_index, bool need_mean,
                                             bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const int64_t n = queries.size(0), d = queries.size(1);
  Tensor lse = arguments.empty({n}, ScalarType::Float);
  Tensor stats = arguments.empty({2, n}, ScalarType::Double);
  Tensor mean = arguments.empty({need_mean ? n : 0, d}, ScalarType::Float);
  wscl::cuda::LogSumExpForward outputs;
  outputs.need_mean = need_mean;
  outputs.lse = device_data<float>(lse);
  outputs.stats = device_data<double>(stats);
  outputs.mean = need_mean ? device_data<float>(mean) : nullptr;
  arguments.run(arguments.pass, outputs, wscl::cuda::logsumexp_forward, scope.stream);
  return {lse, stats, mean};
}

Tensor logsumexp_key_gradient(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                              const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
                              const std::optional<Tensor>& own, const Tensor& scale, int64_t meets,
                              int64_t ignore_index, const Tensor& stats, bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const Tensor upstream = check_vector("grad", grad, queries.size(0), ScalarType::Float);
  const Tensor softmax = check_stats("stats", stats, queries.size(0));
  Tensor grad_keys = arguments.empty_keys();
  wscl::cuda::LogSumExpKeyGradient outputs;
  outputs.grad = device_data<float>(upstream);
  outputs.stats = device_data<double>(softmax);
  outputs.grad_keys = arguments.keys_data(grad_keys);
  arguments.run(arguments.pass, outputs, wscl::cuda::logsumexp_key_gradient, scope.stream);
  return grad_keys;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> two_way_logsumexp(const Tensor& queries, const Tensor& keys,
                                                             const std::optional<Tensor>& query_ids,
                                                             const std::optional<Tensor>& key_ids,
                                                             const std::optional<Tensor>& own,
                                                             const Tensor& scale, int64_t meets,
                                                             int64_t ignore_index, bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const int64_t n = queries.size(0), m = keys.size(0);
  Tensor row_lse = arguments.empty({n}, ScalarType::Float);
  Tensor column_lse = arguments.empty({m}, ScalarType::Float);
  Tensor row_stats = arguments.empty({2, n}, ScalarType::Double);
  Tensor column_stats = arguments.empty({2, m}, ScalarType::Double);
  wscl::cuda::TwoWayForward outputs;
  outputs.row_lse = device_data<float>(row_lse);
  outputs.column_lse = device_data<float>(column_lse);
  outputs.row_stats = device_data<double>(row_stats);
  outputs.column_stats = device_data<double>(column_stats);
  arguments.run(arguments.pass, outputs, wscl::cuda::two_way_forward, scope.stream);
  return {row_lse, column_lse, row_stats, column_stats};
}

std::tuple<Tensor, Tensor> two_way_logsumexp_backward(
    const Tensor& grad_rows, const Tensor& grad_columns, const Tensor& queries, const Tensor& keys,
    const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
    const std::optional<Tensor>& own, const Tensor& scale, int64_t meets, int64_t ignore_index,
    const Tensor& row_stats, const Tensor& column_stats, bool need_queries, bool need_keys, bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const int64_t n = queries.size(0), m = keys.size(0), d = queries.size(1);
  const Tensor of_rows = check_vector("grad_rows", grad_rows, n, ScalarType::Float);
  const Tensor of_columns = check_vector("grad_columns", grad_columns, m, ScalarType::Float);
  const Tensor rows = check_stats("row_stats", row_stats, n);
  const Tensor columns = check_stats("column_stats", column_stats, m);
  Tensor grad_queries = arguments.empty({need_queries ? n : 0, d}, ScalarType::Float);
  Tensor grad_keys = arguments.empty({need_keys ? m : 0, d}, ScalarType::Float);
  wscl::cuda::TwoWayBackward outputs;
  outputs.need_queries = need_queries;
  outputs.need_keys = need_keys;
  outputs.grad_rows = device_data<float>(of_rows);
  outputs.grad_columns = device_data<float>(of_columns);
  outputs.row_stats = device_data<double>(rows);
  outputs.column_stats = device_data<double>(columns);
  outputs.grad_queries = device_data<float>(grad_queries);
  outputs.grad_keys = device_data<float>(grad_keys);
  if (need_queries || need_keys)
    arguments.run(arguments.pass, outputs, wscl::cuda::two_way_backward, scope.stream);
  return {grad_queries, grad_keys};
}

std::tuple<Tensor, Tensor, Tensor> softplus_sum(const Tensor& queries, const Tensor& keys,
                                                const std::optional<Tensor>& query_ids,
                                                const std::optional<Tensor>& key_ids,
                                                const std::optional<Tensor>& own, const Tensor& scale,
                                                const Tensor& offset, int64_t meets, int64_t ignore_index,
                                                bool need_direction, bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const int64_t n = queries.size(0), d = queries.size(1);
  const Tensor offsets = check_vector("offset", offset, n, ScalarType::Float);
  Tensor sum = arguments.empty({n}, ScalarType::Float);
  Tensor slope = arguments.empty({n}, ScalarType::Float);
  Tensor direction = arguments.empty({need_direction ? n : 0, d}, ScalarType::Float);
  wscl::cuda::SoftplusForward outputs;
  outputs.need_direction = need_direction;
  outputs.offset = device_data<float>(offsets);
  outputs.sum = device_data<float>(sum);
  outputs.slope = device_data<float>(slope);
  outputs.direction = need_direction ? device_data<float>(direction) : nullptr;
  arguments.run(arguments.pass, outputs, wscl::cuda::softplus_forward, scope.stream);
  return {sum, slope, direction};
}

Tensor softplus_sum_key_gradient(const Tensor& grad, const Tensor& queries, const Tensor& keys,
                                 const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
                                 const std::optional<Tensor>& own, const Tensor& scale, const Tensor& offset,
                                 int64_t meets, int64_t ignore_index, bool allow_tf32) {
  const DeviceScope scope(queries);
  const PairsArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index, allow_tf32,
                                 scope.stream);
  const Tensor upstream = check_vector("grad", grad, queries.size(0), ScalarType::Float);
  const Tensor offsets = check_vector("offset", offset, queries.size(0), ScalarType::Float);
  Tensor grad_keys = arguments.empty_keys();
  wscl::cuda::SoftplusKeyGradient outputs;
  outputs.offset = device_data<float>(offsets);
  outputs.grad = device_data<float>(upstream);
  outputs.grad_keys = arguments.keys_data(grad_keys);
  arguments.run(arguments.pass, outputs, wscl::cuda::softplus_key_gradient, scope.stream);
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_key_gradient", TORCH_BOX(&logsumexp_key_gradient));
  m.impl("two_way_logsumexp", TORCH_BOX(&two_way_logsumexp));
  m.impl("two_way_logsumexp_backward", TORCH_BOX(&two_way_logsumexp_backward));
  m.impl("softplus_sum", TORCH_BOX(&softplus_sum));
  m.impl("softplus_sum_key_gradient", TORCH_BOX(&softplus_sum_key_gradient));
}
