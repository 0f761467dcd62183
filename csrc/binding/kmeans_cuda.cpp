// kmeans_assign and kmeans_update on CUDA tensors: checks and allocation. Everything is enqueued on the current
// stream; nothing waits for the device, so a CUDA graph can capture it.

#include <optional>
#include <tuple>

#include "../core/kmeans_cuda.h"
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
using wscl::cuda::KMeansProblem;
using wscl::cuda::Precision;

constexpr int64_t kMostCentroids = (int64_t(1) << 31) - 1;

Precision precision_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Precision::kFloat32;
    case ScalarType::BFloat16:
      return Precision::kBFloat16;
    case ScalarType::Half:
      return Precision::kFloat16;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, bfloat16 or float16 on CUDA; impl='chunked' takes float64");
  }
}

// The arguments, checked and made contiguous where the kernels need it, and the outputs that both operators
// have; holds what the problem points to.
struct Pass {
  Tensor x, centroids;
  Tensor assignment, distance, bad_row;
  KMeansProblem problem;

  Pass(const Tensor& x_, const Tensor& centroids_, bool cosine, std::optional<int64_t> top, int64_t candidates)
      : x(check_points(x_)), centroids(check_centroids(centroids_, x_)) {
    const int64_t n = x.size(0), k = centroids.size(0), wanted = top ? *top : 1;
    STD_TORCH_CHECK(wanted >= 1 && wanted <= k && wanted <= wscl::cuda::kMostTop, "top: expected 1 to ",
                    wscl::cuda::kMostTop, " and at most the number of centroids, got ", wanted);
    // There is one product of float16, whatever is asked for: the results do not depend on it.
    STD_TORCH_CHECK(candidates >= 0 && candidates <= 2,
                    "candidates: expected 0 (auto), 1 (full) or 2 (bfloat16), got ", candidates);
    assignment = top ? torch::stable::new_empty(x, {n, wanted}, ScalarType::Long)
                     : torch::stable::new_empty(x, {n}, ScalarType::Long);
    distance =
        top ? torch::stable::new_empty(centroids, {n, wanted}) : torch::stable::new_empty(centroids, {n});
    bad_row = torch::stable::new_empty(x, {}, ScalarType::Long);
    problem.precision = precision_of(x);
    problem.x = device_data<void>(x, wscl::cuda::element_size(problem.precision));
    problem.x_stride = x.stride(0);
    problem.centroids = device_data<float>(centroids);
    problem.n = n;
    problem.d = x.size(1);
    problem.k = k;
    problem.cosine = cosine;
    problem.top = static_cast<int>(wanted);
    problem.assignment = device_data<int64_t>(assignment);
    problem.distance = device_data<float>(distance);
    problem.bad_row = device_data<int64_t>(bad_row);
  }

  // Calls the pass twice: for the bytes of workspace that it needs, and to enqueue it.
  void run(cudaStream_t stream) {
    check_launch(wscl::cuda::kmeans_pass(problem, stream));
    const Tensor workspace = torch::stable::new_empty(x, {problem.workspace_bytes + 1}, ScalarType::Byte);
    problem.workspace = device_data<void>(workspace, 1);
    check_launch(wscl::cuda::kmeans_pass(problem, stream));
  }

 private:
  static Tensor check_points(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix [rows, d], got ", x.dim(), " dimensions");
    return with_unit_columns(x);
  }
  static Tensor check_centroids(const Tensor& centroids, const Tensor& x) {
    STD_TORCH_CHECK(centroids.dim() == 2 && centroids.size(1) == x.size(1) && centroids.size(0) > 0,
                    "centroids: expected a matrix [K, ", x.size(1), "] of at least one row");
    STD_TORCH_CHECK(centroids.size(0) < kMostCentroids, "centroids: expected fewer than 2^31, got ",
                    centroids.size(0));
    STD_TORCH_CHECK(centroids.scalar_type() == ScalarType::Float,
                    "centroids: expected float32 on CUDA; impl='chunked' takes float64");
    STD_TORCH_CHECK(centroids.get_device_index() == x.get_device_index(),
                    "centroids: expected the device of x");
    return torch::stable::contiguous(centroids);
  }
};

std::tuple<Tensor, Tensor, Tensor> kmeans_assign(const Tensor& x, const Tensor& centroids, bool cosine,
                                                 int64_t top, int64_t candidates) {
  const DeviceScope scope(x);
  Pass pass(x, centroids, cosine, top, candidates);
  pass.run(scope.stream);
  return {pass.assignment, pass.distance, pass.bad_row};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_update(const Tensor& x,
                                                                         const Tensor& centroids,
                                                                         const std::optional<Tensor>& weights_,
                                                                         bool cosine, int64_t candidates) {
  const DeviceScope scope(x);
  Pass pass(x, centroids, cosine, std::nullopt, candidates);
  KMeansProblem& problem = pass.problem;
  std::optional<Tensor> weights;
  if (weights_) weights = check_vector("weights", *weights_, problem.n, ScalarType::Double);
  Tensor sums = torch::stable::new_empty(x, {problem.k, problem.d}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(x, {problem.k}, weights ? ScalarType::Double : ScalarType::Long);
  Tensor inertia = torch::stable::new_empty(x, {}, ScalarType::Double);
  problem.sums = device_data<double>(sums);
  problem.inertia = device_data<double>(inertia);
  if (weights) {
    problem.weights = device_data<double>(*weights);
    problem.weight_sums = device_data<double>(counts);
  } else {
    problem.counts = device_data<int64_t>(counts);
  }
  pass.run(scope.stream);
  return {pass.assignment, pass.distance, sums, counts, inertia, pass.bad_row};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(WSCL_LIBRARY, WSCL_DISPATCH_KEY, m) {
  m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));
  m.impl("kmeans_update", TORCH_BOX(&kmeans_update));
}
