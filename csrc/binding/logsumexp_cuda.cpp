// logsumexp and logsumexp_key_gradient on CUDA tensors: checks, allocation, the sort of the ids where ids
// decide who meets whom. Enqueued on the current stream, as in infonce_cuda.cpp.

#include "../core/logsumexp_cuda.h"

#include <tuple>

#include "arguments_cuda.h"

namespace {

using namespace wscl::binding;
using wscl::cuda::Meets;

struct LogSumExpArguments : CudaArguments {
  wscl::cuda::LogSumExpProblem pass;

  LogSumExpArguments(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& query_ids,
                     const std::optional<Tensor>& key_ids, const std::optional<Tensor>& own,
                     const Tensor& scale, int64_t meets, int64_t ignore_index)
      : CudaArguments(queries, keys, query_ids, key_ids, own, scale, false, meets != 0, ignore_index) {
    STD_TORCH_CHECK(meets >= 0 && meets <= 2, "meets: expected 0 (all), 1 (same) or 2 (other), got ", meets);
    STD_TORCH_CHECK(meets == 0 || (query_ids && key_ids),
                    "meets: 'same' and 'other' need query_ids and key_ids");
    if (meets != 0) sort();
    pass = {problem, static_cast<Meets>(meets)};
  }
};

std::tuple<Tensor, Tensor, Tensor> logsumexp(const Tensor& queries, const Tensor& keys,
                                             const std::optional<Tensor>& query_ids,
                                             const std::optional<Tensor>& key_ids,
                                             const std::optional<Tensor>& own, const Tensor& scale,
                                             int64_t meets, int64_t ignore_index, bool need_mean) {
  const DeviceScope scope(queries);
  const LogSumExpArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
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
                              int64_t ignore_index, const Tensor& stats) {
  const DeviceScope scope(queries);
  const LogSumExpArguments arguments(queries, keys, query_ids, key_ids, own, scale, meets, ignore_index);
  const int64_t n = queries.size(0);
  const Tensor upstream = check_vector("grad", grad, n, ScalarType::Float);
  const Tensor softmax = torch::stable::contiguous(stats);
  STD_TORCH_CHECK(softmax.dim() == 2 && softmax.size(0) == 2 && softmax.size(1) == n &&
                      softmax.scalar_type() == ScalarType::Double,
                  "stats: expected a float64 tensor [2, ", n, "]");
  Tensor grad_keys = arguments.empty({keys.size(0), keys.size(1)}, queries.scalar_type());
  wscl::cuda::LogSumExpKeyGradient outputs;
  outputs.grad = device_data<float>(upstream);
  outputs.stats = device_data<double>(softmax);
  outputs.grad_keys = device_data<void>(grad_keys, wscl::cuda::element_size(arguments.problem.precision));
  arguments.run(arguments.pass, outputs, wscl::cuda::logsumexp_key_gradient, scope.stream);
  return grad_keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("logsumexp_key_gradient", TORCH_BOX(&logsumexp_key_gradient));
}
