// The losses of infonce_cuda.h on CUDA tensors: checks, allocation, the sort of the ids. Everything is enqueued
// on the current stream; nothing waits for the device, so a CUDA graph can capture it.

#include <tuple>

#include "arguments_cuda.h"

namespace {

using namespace wscl::binding;

void check_clusters(const std::optional<Tensor>& keys, const std::optional<Tensor>& key_clusters) {
  STD_TORCH_CHECK(keys.has_value() == key_clusters.has_value(), "keys and key_clusters go together");
}

// The scale of those who give no tensor of it.
float check_constant(const std::optional<Tensor>& scale, double constant) {
  STD_TORCH_CHECK(scale || constant > 0, "constant_scale: expected a number above 0, got ", constant);
  return static_cast<float>(constant);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_forward(
    const Tensor& queries, const std::optional<Tensor>& keys, const Tensor& query_clusters,
    const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own, const Tensor& scale,
    bool exclude_self, bool inner, int64_t ignore_index, bool need_direction, bool allow_tf32) {
  check_clusters(keys, key_clusters);
  const DeviceScope scope(queries);
  CudaArguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                          ignore_index, allow_tf32);
  arguments.sort(scope.stream);
  const int64_t n = queries.size(0), d = queries.size(1);
  wscl::cuda::InfoNCEForward outputs;
  outputs.need_direction = need_direction && keys.has_value();
  Tensor loss = arguments.empty({n}, ScalarType::Float);
  Tensor count = arguments.empty({n}, ScalarType::Long);
  Tensor stats = arguments.empty({inner ? 4 : 2, n}, ScalarType::Double);
  Tensor direction = arguments.empty({outputs.need_direction ? n : 0, d}, ScalarType::Float);
  outputs.loss = device_data<float>(loss);
  outputs.count = device_data<int64_t>(count);
  outputs.stats = device_data<double>(stats);
  outputs.direction = outputs.need_direction ? device_data<float>(direction) : nullptr;
  arguments.run(arguments.problem, outputs, wscl::cuda::infonce_forward, scope.stream);
  return {loss, count, stats, direction};
}

// What a backward pass is asked for, and where it goes; what is not asked for has no numbers.
struct Gradients {
  Tensor direction, queries, keys, scale;
  wscl::cuda::InfoNCEBackward outputs;

  Gradients(const CudaArguments& arguments, const Tensor& direction_, bool need_queries, bool need_keys,
            bool need_scale)
      : direction(torch::stable::contiguous(direction_)) {
    const wscl::cuda::InfoNCEProblem& problem = arguments.problem;
    STD_TORCH_CHECK(problem.self || !(need_queries || need_scale) || direction.size(0) == problem.n,
                    "direction: expected the forward pass's with need_direction");
    need_keys = need_keys && !problem.self;
    outputs.need_queries = need_queries;
    outputs.need_keys = need_keys;
    outputs.need_scale = need_scale;
    const ScalarType dtype = arguments.queries.scalar_type();
    queries = arguments.empty({need_queries ? problem.n : 0, problem.d}, dtype);
    keys = arguments.empty({need_keys ? problem.m : 0, problem.d}, dtype);
    scale = need_scale ? arguments.empty({}, ScalarType::Float) : arguments.empty({0}, ScalarType::Float);
    const int64_t size = wscl::cuda::element_size(problem.precision);
    outputs.direction = device_data<float>(direction);
    if (need_queries) outputs.grad_queries = device_data<void>(queries, size);
    if (need_keys) outputs.grad_keys = device_data<void>(keys, size);
    if (need_scale) outputs.grad_scale = device_data<float>(scale);
  }

  template <class Pass>
  std::tuple<Tensor, Tensor, Tensor> run(const CudaArguments& arguments, const Pass& pass,
                                         cudaStream_t stream) {
    if (outputs.need_queries || outputs.need_keys || outputs.need_scale)
      arguments.run(arguments.problem, outputs, pass, stream);
    return {queries, keys, scale};
  }
};

std::tuple<Tensor, Tensor, Tensor> infonce_backward(
    const Tensor& grad_loss, const Tensor& queries, const std::optional<Tensor>& keys,
    const Tensor& query_clusters, const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const Tensor& scale, bool exclude_self, bool inner, int64_t ignore_index, const Tensor& count,
    const Tensor& stats, const Tensor& direction, bool need_queries, bool need_keys, bool need_scale,
    bool allow_tf32) {
  check_clusters(keys, key_clusters);
  const DeviceScope scope(queries);
  CudaArguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                          ignore_index, allow_tf32);
  const int64_t n = queries.size(0);
  const Tensor upstream = check_vector("grad_loss", grad_loss, n, ScalarType::Float);
  const Tensor counts = check_vector("count", count, n, ScalarType::Long);
  const Tensor softmax = torch::stable::contiguous(stats);
  STD_TORCH_CHECK(softmax.dim() == 2 && softmax.size(0) == (inner ? 4 : 2) && softmax.size(1) == n &&
                      softmax.scalar_type() == ScalarType::Double,
                  "stats: expected the forward pass's");
  if (!keys || need_keys)
    arguments.sort(scope.stream);  // gradients of queries alone are read off the direction
  Gradients gradients(arguments, direction, need_queries, need_keys, need_scale);
  gradients.outputs.grad_loss = device_data<float>(upstream);
  gradients.outputs.count = device_data<int64_t>(counts);
  gradients.outputs.stats = device_data<double>(softmax);
  return gradients.run(arguments, wscl::cuda::infonce_backward, scope.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_reduced_forward(
    const Tensor& queries, const std::optional<Tensor>& keys, const Tensor& query_clusters,
    const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const std::optional<Tensor>& scale, double constant_scale, bool exclude_self, bool inner,
    int64_t ignore_index, bool mean, bool need_direction, bool allow_tf32) {
  check_clusters(keys, key_clusters);
  const DeviceScope scope(queries);
  CudaArguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                          ignore_index, allow_tf32);
  arguments.problem.constant_scale = check_constant(scale, constant_scale);
  arguments.sort_long();
  const int64_t n = queries.size(0), d = queries.size(1);
  wscl::cuda::InfoNCEReduced outputs;
  outputs.mean = mean;
  outputs.need_direction = need_direction && keys.has_value();
  Tensor loss = arguments.empty({}, ScalarType::Float);
  Tensor count = arguments.empty({n}, ScalarType::Long);
  Tensor direction = arguments.empty({outputs.need_direction ? n : 0, d}, ScalarType::Float);
  Tensor kept = arguments.empty({wscl::cuda::infonce_kept_bytes(arguments.problem)}, ScalarType::Byte);
  outputs.loss = device_data<float>(loss);
  outputs.count = device_data<int64_t>(count);
  outputs.direction = outputs.need_direction ? device_data<float>(direction) : nullptr;
  outputs.kept = device_data<void>(kept, 1);
  arguments.run(arguments.problem, outputs, wscl::cuda::infonce_reduced_forward, scope.stream);
  return {loss, count, direction, kept};
}

std::tuple<Tensor, Tensor, Tensor> infonce_reduced_backward(
    const Tensor& grad_loss, const Tensor& queries, const std::optional<Tensor>& keys,
    const Tensor& query_clusters, const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const std::optional<Tensor>& scale, double constant_scale, bool exclude_self, bool inner,
    int64_t ignore_index, const Tensor& direction, const Tensor& kept, bool need_queries, bool need_keys,
    bool need_scale, bool allow_tf32) {
  check_clusters(keys, key_clusters);
  const DeviceScope scope(queries);
  CudaArguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                          ignore_index, allow_tf32);
  arguments.problem.constant_scale = check_constant(scale, constant_scale);
  check_number("grad_loss", grad_loss);
  const Tensor before =
      check_vector("kept", kept, wscl::cuda::infonce_kept_bytes(arguments.problem), ScalarType::Byte);
  Gradients gradients(arguments, direction, need_queries, need_keys, need_scale);
  gradients.outputs.grad_loss = device_data<float>(grad_loss);
  const auto pass = [memory = device_data<void>(before, 1)](const wscl::cuda::InfoNCEProblem& problem,
                                                            wscl::cuda::InfoNCEBackward& to,
                                                            cudaStream_t stream) {
    return wscl::cuda::infonce_reduced_backward(problem, memory, to, stream);
  };
  return gradients.run(arguments, pass, scope.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("infonce_forward", TORCH_BOX(&infonce_forward));
  m.impl("infonce_backward", TORCH_BOX(&infonce_backward));
  m.impl("infonce_reduced_forward", TORCH_BOX(&infonce_reduced_forward));
  m.impl("infonce_reduced_backward", TORCH_BOX(&infonce_reduced_backward));
}
