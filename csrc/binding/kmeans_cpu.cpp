// kmeans_assign, kmeans_update, kmeans_update_bounded, kmeans_distances and kmeans_potentials on CPU tensors:
// checks, allocation, dispatch on dtype.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "../core/kmeans.h"
#include "../core/kmeans_bounds.h"
#include "../core/kmeans_potentials.h"
#include "tensors.h"

namespace {

using namespace wscl::binding;

wscl::Points points_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix [rows, d], got ", x.dim(), " dimensions");
  wscl::Points points;
  points.data = x.data_ptr();
  points.row_stride = x.stride(0);
  points.column_stride = x.stride(1);
  points.count = x.size(0);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      points.type = wscl::PointType::kFloat;
      break;
    case ScalarType::Double:
      points.type = wscl::PointType::kDouble;
      break;
    case ScalarType::Half:
      points.type = wscl::PointType::kHalf;
      break;
    case ScalarType::BFloat16:
      points.type = wscl::PointType::kBfloat16;
      break;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16");
  }
  return points;
}

Tensor check_centroids(const Tensor& centroids, const Tensor& x) {
  STD_TORCH_CHECK(centroids.dim() == 2 && centroids.size(1) == x.size(1) && centroids.size(0) > 0,
                  "centroids: expected a matrix [K, ", x.size(1), "] of at least one row");
  const ScalarType dtype = centroids.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || (dtype == ScalarType::Float && x.scalar_type() != ScalarType::Double),
      "centroids: expected float64, or float32 where x is not float64");
  return torch::stable::contiguous(centroids);
}

wscl::Candidates candidates_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 2, "candidates: expected 0 (auto), 1 (full) or 2 (bfloat16), got ",
                  number);
  return static_cast<wscl::Candidates>(number);
}

// The problem but for what an update adds to it; runs it, and returns the first bad row or −1, 0-dim.
template <class F>
Tensor run(const Tensor& x, const Tensor& centroids, bool cosine, int64_t candidates, Tensor& assignment,
           Tensor& distance, const F& complete) {
  Tensor bad_row = torch::stable::new_empty(assignment, {});
  dispatch(centroids.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    wscl::KMeansProblem<T> problem;
    problem.x = points_of(x);
    problem.centroids = data<T>(centroids);
    problem.k = centroids.size(0);
    problem.d = centroids.size(1);
    problem.cosine = cosine;
    problem.candidates = candidates_of(candidates);
    problem.assignment = data<int64_t>(assignment);
    problem.distance = data<T>(distance);
    complete(problem);
    *data<int64_t>(bad_row) = wscl::kmeans_pass<T>(problem, torch_threads());
  });
  return bad_row;
}

std::tuple<Tensor, Tensor, Tensor> kmeans_assign(const Tensor& x, const Tensor& centroids_, bool cosine,
                                                 int64_t top, int64_t candidates) {
  const Tensor centroids = check_centroids(centroids_, x);
  STD_TORCH_CHECK(top >= 1 && top <= centroids.size(0) && top <= wscl::kMostTop, "top: expected 1 to ",
                  wscl::kMostTop, " and at most the number of centroids, got ", top);
  Tensor assignment = torch::stable::new_empty(x, {x.size(0), top}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(centroids, {x.size(0), top});
  Tensor bad_row =
      run(x, centroids, cosine, candidates, assignment, distance, [&](auto& problem) { problem.top = top; });
  return {assignment, distance, bad_row};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kmeans_update(const Tensor& x,
                                                                         const Tensor& centroids_,
                                                                         const std::optional<Tensor>& weights_,
                                                                         bool cosine, int64_t candidates) {
  const Tensor centroids = check_centroids(centroids_, x);
  const int64_t n = x.size(0), k = centroids.size(0), d = centroids.size(1);
  std::optional<Tensor> weights;
  if (weights_) weights = check_vector("weights", *weights_, n, ScalarType::Double);
  Tensor assignment = torch::stable::new_empty(x, {n}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(centroids, {n});
  Tensor sums = torch::stable::new_empty(x, {k, d}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(x, {k}, weights ? ScalarType::Double : ScalarType::Long);
  Tensor inertia = torch::stable::new_empty(x, {}, ScalarType::Double);
  Tensor bad_row = run(x, centroids, cosine, candidates, assignment, distance, [&](auto& problem) {
    problem.sums = data<double>(sums);
    problem.inertia = data<double>(inertia);
    if (weights) {
      problem.weights = data<double>(*weights);
      problem.weight_sums = data<double>(counts);
    } else {
      problem.counts = data<int64_t>(counts);
    }
  });
  return {assignment, distance, sums, counts, inertia, bad_row};
}

// Refuses clusters that are not `least` to k − 1.
void check_assignment(const Tensor& assignment, int64_t least, int64_t k) {
  const int64_t* clusters = data<int64_t>(assignment);
  std::atomic<int64_t> bad{-1};
  torch_threads().ranges(assignment.size(0), 1 << 14, [&](int64_t begin, int64_t end) {
    int64_t low = least, high = least;
    for (int64_t i = begin; i < end; ++i) {
      low = std::min(low, clusters[i]);
      high = std::max(high, clusters[i]);
    }
    if (low < least || high >= k)
      bad = std::find_if(clusters + begin, clusters + end, [&](int64_t j) { return j < least || j >= k; }) -
            clusters;
  });
  STD_TORCH_CHECK(bad < 0, "assignment: expected 0 to ", k - 1, least < 0 ? ", or -1 for none" : "", ", got ",
                  clusters[bad]);
}

// Tensors that the operator writes into: as they are, or it would write into a copy.
void check_written(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
                  ": expected another dtype, or contiguous");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans_update_bounded(
    const Tensor& x, const Tensor& centroids_, Tensor assignment, Tensor distance, Tensor lower, Tensor sums,
    const std::optional<Tensor>& previous_, const std::optional<Tensor>& half_,
    const std::optional<Tensor>& weights_, bool cosine, int64_t candidates) {
  const Tensor centroids = check_centroids(centroids_, x);
  const ScalarType dtype = centroids.scalar_type();
  const int64_t n = x.size(0), k = centroids.size(0), d = centroids.size(1);
  check_vector("assignment", assignment, n, ScalarType::Long);
  check_vector("distance", distance, n, dtype);
  check_vector("lower", lower, n, dtype);
  check_written("assignment", assignment, ScalarType::Long);
  check_written("distance", distance, dtype);
  check_written("lower", lower, dtype);
  check_written("sums", sums, ScalarType::Double);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == k && sums.size(1) == d, "sums: expected shape [", k, ", ",
                  d, "]");
  check_assignment(assignment, previous_ ? 0 : -1, k);
  std::optional<Tensor> previous, half, weights;
  if (previous_) {
    previous = check_centroids(*previous_, x);
    STD_TORCH_CHECK(previous->size(0) == k && previous->scalar_type() == dtype,
                    "previous: expected shape and dtype of centroids");
  }
  if (half_) half = check_vector("half", *half_, k, dtype);
  if (weights_) weights = check_vector("weights", *weights_, n, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(x, {k}, weights ? ScalarType::Double : ScalarType::Long);
  Tensor inertia = torch::stable::new_empty(x, {}, ScalarType::Double);
  Tensor peak = torch::stable::new_empty(x, {}, ScalarType::Double);
  Tensor tally = torch::stable::new_empty(assignment, {4});
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    wscl::BoundsProblem<T> problem;
    problem.x = points_of(x);
    problem.centroids = data<T>(centroids);
    problem.k = k;
    problem.d = d;
    problem.cosine = cosine;
    problem.candidates = candidates_of(candidates);
    problem.assignment = data<int64_t>(assignment);
    problem.distance = data<T>(distance);
    problem.sums = data<double>(sums);
    problem.inertia = data<double>(inertia);
    problem.lower = data<T>(lower);
    if (previous) problem.previous = data<T>(*previous);
    if (half) problem.half = data<T>(*half);
    if (weights) {
      problem.weights = data<double>(*weights);
      problem.weight_sums = data<double>(counts);
    } else {
      problem.counts = data<int64_t>(counts);
    }
    const wscl::BoundedPass pass = wscl::kmeans_bounded_pass<T>(problem, torch_threads());
    *data<double>(peak) = pass.peak;
    const int64_t numbers[] = {pass.changed, pass.searched, pass.by_half, pass.bad_row};
    std::copy(numbers, numbers + 4, data<int64_t>(tally));
  });
  return {counts, inertia, peak, tally};
}

std::tuple<Tensor, Tensor> kmeans_distances(const Tensor& x, const Tensor& centroids_,
                                            const Tensor& assignment_, const std::optional<Tensor>& weights_,
                                            bool cosine) {
  const Tensor centroids = check_centroids(centroids_, x);
  const int64_t n = x.size(0), k = centroids.size(0);
  const Tensor assignment = check_vector("assignment", assignment_, n, ScalarType::Long);
  check_assignment(assignment, 0, k);
  std::optional<Tensor> weights;
  if (weights_) weights = check_vector("weights", *weights_, n, ScalarType::Double);
  Tensor distance = torch::stable::new_empty(centroids, {n});
  Tensor inertia = torch::stable::new_empty(x, {}, ScalarType::Double);
  dispatch(centroids.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    wscl::KMeansProblem<T> problem;
    problem.x = points_of(x);
    problem.centroids = data<T>(centroids);
    problem.k = k;
    problem.d = centroids.size(1);
    problem.cosine = cosine;
    problem.assignment = const_cast<int64_t*>(data<int64_t>(assignment));  // only read
    problem.distance = data<T>(distance);
    if (weights) problem.weights = data<double>(*weights);
    problem.inertia = data<double>(inertia);
    wscl::kmeans_distances<T>(problem, torch_threads());
  });
  return {distance, inertia};
}

std::tuple<Tensor, Tensor> kmeans_potentials(const Tensor& x, const Tensor& candidates_, const Tensor& nearest_,
                                             const std::optional<Tensor>& scale_,
                                             const std::optional<Tensor>& weights_) {
  const Tensor candidates = check_centroids(candidates_, x);
  const int64_t n = x.size(0), m = candidates.size(0);
  const ScalarType dtype = candidates.scalar_type();
  const Tensor nearest = check_vector("nearest", nearest_, n, dtype);
  std::optional<Tensor> scale, weights;
  if (scale_) scale = check_vector("scale", *scale_, n, dtype);
  if (weights_) weights = check_vector("weights", *weights_, n, ScalarType::Double);
  Tensor distance = torch::stable::new_empty(candidates, {m, n});
  Tensor potential = torch::stable::new_empty(candidates, {m}, ScalarType::Double);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    wscl::PotentialsProblem<T> problem;
    problem.x = points_of(x);
    problem.candidates = data<T>(candidates);
    problem.m = m;
    problem.d = candidates.size(1);
    problem.nearest = data<T>(nearest);
    if (scale) problem.scale = data<T>(*scale);
    if (weights) problem.weights = data<double>(*weights);
    problem.distance = data<T>(distance);
    problem.potential = data<double>(potential);
    wscl::kmeans_potentials<T>(problem, torch_threads());
  });
  return {distance, potential};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wscl_fast, CPU, m) {
  m.impl("kmeans_assign", TORCH_BOX(&kmeans_assign));
  m.impl("kmeans_update", TORCH_BOX(&kmeans_update));
  m.impl("kmeans_update_bounded", TORCH_BOX(&kmeans_update_bounded));
  m.impl("kmeans_distances", TORCH_BOX(&kmeans_distances));
  m.impl("kmeans_potentials", TORCH_BOX(&kmeans_potentials));
}
