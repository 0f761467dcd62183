// infonce_forward and infonce_backward on CUDA tensors: checks, allocation, the sort of the ids. Everything is
// enqueued on the current stream; nothing waits for the device, so a CUDA graph can capture it.

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "../core/infonce_cuda.h"
#include "device.h"

#ifndef WSCL_SIMULATED
#define WSCL_LIBRARY wscl_fast
#define WSCL_DISPATCH_KEY CUDA
#else
#define WSCL_LIBRARY wscl_fast_simulated
#define WSCL_DISPATCH_KEY CPU
#endif

namespace {

using namespace wscl::binding;
using wscl::cuda::Precision;

constexpr int64_t kMostRows = (int64_t(1) << 31) - 1;

Precision precision_of(const Tensor& queries) {
  const ScalarType dtype = queries.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "queries: expected float32, bfloat16 or float16 on CUDA; impl='chunked' takes float64");
  if (dtype == ScalarType::Float) return Precision::kFloat32;
  return dtype == ScalarType::BFloat16 ? Precision::kBFloat16 : Precision::kFloat16;
}

Tensor check_rows(const char* name, const Tensor& matrix, const Tensor& queries) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, ": expected a matrix [rows, d], got ", matrix.dim(), " dimensions");
  STD_TORCH_CHECK(matrix.scalar_type() == queries.scalar_type(), name, ": expected the dtype of queries");
  STD_TORCH_CHECK(matrix.size(1) == queries.size(1), name, ": expected ", queries.size(1), " columns, got ",
                  matrix.size(1));
  STD_TORCH_CHECK(matrix.size(0) < kMostRows, name, ": expected fewer than 2^31 rows, got ", matrix.size(0));
  return with_unit_columns(matrix);
}

// Values and order of ascending ids, ties as they come.
std::pair<Tensor, Tensor> sort_ids(const Tensor& ids) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(ids), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The arguments, checked and made contiguous where the kernels need it; holds what the problem points to.
struct Arguments {
  Tensor queries;
  std::optional<Tensor> keys;
  Tensor query_clusters;
  std::optional<Tensor> key_clusters, own;
  Tensor scale;
  std::optional<std::pair<Tensor, Tensor>> sorted_queries, sorted_keys;
  wscl::cuda::InfoNCEProblem problem;

  Arguments(const Tensor& queries_, const std::optional<Tensor>& keys_, const Tensor& query_clusters_,
            const std::optional<Tensor>& key_clusters_, const std::optional<Tensor>& own_, const Tensor& scale_,
            bool exclude_self, bool inner, int64_t ignore_index)
      : queries(check_rows("queries", queries_, queries_)),
        query_clusters(check_vector("query_clusters", query_clusters_, queries_.size(0), ScalarType::Long)),
        scale(scale_) {
    STD_TORCH_CHECK(keys_.has_value() == key_clusters_.has_value(), "keys and key_clusters go together");
    STD_TORCH_CHECK(keys_.has_value() || !own_.has_value(), "own: expected none where keys is none");
    STD_TORCH_CHECK(scale.dim() == 0 && scale.scalar_type() == ScalarType::Float,
                    "scale: expected a 0-dim float32 tensor");
    problem.precision = precision_of(queries);
    const int64_t size = wscl::cuda::element_size(problem.precision);
    problem.n = problem.m = queries.size(0);
    problem.d = queries.size(1);
    problem.self = !keys_;
    problem.queries = problem.keys = device_data<void>(queries, size);
    problem.query_stride = problem.key_stride = queries.stride(0);
    problem.query_clusters = problem.key_clusters = device_data<int64_t>(query_clusters);
    if (keys_) {
      keys = check_rows("keys", *keys_, queries);
      key_clusters = check_vector("key_clusters", *key_clusters_, keys->size(0), ScalarType::Long);
      problem.keys = device_data<void>(*keys, size);
      problem.key_stride = keys->stride(0);
      problem.m = keys->size(0);
      problem.key_clusters = device_data<int64_t>(*key_clusters);
    }
    if (own_) {
      own = check_vector("own", *own_, queries.size(0), ScalarType::Long);
      problem.own = device_data<int64_t>(*own);
    }
    problem.exclude_self = exclude_self;
    problem.inner = inner;
    problem.ignore_index = ignore_index;
    problem.scale = device_data<float>(scale);
  }

  void sort() {
    sorted_queries = sort_ids(query_clusters);
    problem.sorted_queries = problem.sorted_keys = device_data<int64_t>(sorted_queries->first);
    problem.query_order = problem.key_order = device_data<int64_t>(sorted_queries->second);
    if (!keys) return;
    sorted_keys = sort_ids(*key_clusters);
    problem.sorted_keys = device_data<int64_t>(sorted_keys->first);
    problem.key_order = device_data<int64_t>(sorted_keys->second);
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return torch::stable::new_empty(queries, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
  }

  // Calls a pass twice: for the bytes of workspace that it needs, and to enqueue it.
  template <class Outputs, class Pass>
  void run(Outputs& outputs, const Pass& pass, cudaStream_t stream) const {
    check_launch(pass(problem, outputs, stream));
    const Tensor workspace = empty({outputs.workspace_bytes + 1}, ScalarType::Byte);
    outputs.workspace = device_data<void>(workspace, 1);
    check_launch(pass(problem, outputs, stream));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> infonce_forward(
    const Tensor& queries, const std::optional<Tensor>& keys, const Tensor& query_clusters,
    const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own, const Tensor& scale,
    bool exclude_self, bool inner, int64_t ignore_index, bool need_direction) {
  const DeviceScope scope(queries);
  Arguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                      ignore_index);
  arguments.sort();
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
  arguments.run(outputs, wscl::cuda::infonce_forward, scope.stream);
  return {loss, count, stats, direction};
}

std::tuple<Tensor, Tensor, Tensor> infonce_backward(
    const Tensor& grad_loss, const Tensor& queries, const std::optional<Tensor>& keys,
    const Tensor& query_clusters, const std::optional<Tensor>& key_clusters, const std::optional<Tensor>& own,
    const Tensor& scale, bool exclude_self, bool inner, int64_t ignore_index, const Tensor& count,
    const Tensor& stats, const Tensor& direction, bool need_queries, bool need_keys, bool need_scale) {
  const DeviceScope scope(queries);
  Arguments arguments(queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner,
                      ignore_index);
  const int64_t n = queries.size(0), d = queries.size(1), m = keys ? keys->size(0) : 0;
  const Tensor upstream = check_vector("grad_loss", grad_loss, n, ScalarType::Float);
  const Tensor counts = check_vector("count", count, n, ScalarType::Long);
  const Tensor softmax = torch::stable::contiguous(stats), directions = torch::stable::contiguous(direction);
  STD_TORCH_CHECK(softmax.dim() == 2 && softmax.size(0) == (inner ? 4 : 2) && softmax.size(1) == n &&
                      softmax.scalar_type() == ScalarType::Double,
                  "stats: expected the forward pass's");
  STD_TORCH_CHECK(!keys || !(need_queries || need_scale) || directions.size(0) == n,
                  "direction: expected the forward pass's with need_direction");
  wscl::cuda::InfoNCEBackward outputs;
  outputs.need_queries = need_queries;
  outputs.need_keys = keys && need_keys;
  outputs.need_scale = need_scale;
  if (!keys || need_keys) arguments.sort();  // gradients of queries alone are read off the direction
  Tensor grad_queries = arguments.empty({need_queries ? n : 0, d}, queries.scalar_type());
  Tensor grad_keys = arguments.empty({outputs.need_keys ? m : 0, d}, queries.scalar_type());
  Tensor grad_scale = torch::stable::new_zeros(scale, {});
  const int64_t size = wscl::cuda::element_size(arguments.problem.precision);
  outputs.grad_loss = device_data<float>(upstream);
  outputs.count = device_data<int64_t>(counts);
  outputs.stats = device_data<double>(softmax);
  outputs.direction = device_data<float>(directions);
  if (need_queries) outputs.grad_queries = device_data<void>(grad_queries, size);
  if (outputs.need_keys) outputs.grad_keys = device_data<void>(grad_keys, size);
  outputs.grad_scale = device_data<float>(grad_scale);
  if (need_queries || outputs.need_keys || need_scale)
    arguments.run(outputs, wscl::cuda::infonce_backward, scope.stream);
  return {grad_queries, grad_keys, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("infonce_forward", TORCH_BOX(&infonce_forward));
  m.impl("infonce_backward", TORCH_BOX(&infonce_backward));
}
