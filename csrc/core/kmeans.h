// K-means on the CPU: nearest centroids of points, and the sums of the clusters, in one pass. No torch, no
// Python.
//
//   assignment_i = argmin_j dist(x_i, c_j), the lowest j of equals
//   sums_k       = Σ_{i: assignment_i = k} w_i x_i          (x_i / ‖x_i‖ for the cosine)
//   counts_k     = Σ_{i: assignment_i = k} w_i
//   inertia      = Σ_i w_i dist(x_i, c_{assignment_i})
//
// dist is ‖x − c‖², or for the cosine 1 − cos(x, c) with cos = 0 where a vector is zero. Assignments are those
// of exact arithmetic: a product of lower precision proposes candidates, and where the bound of its error
// leaves more than one, float64 decides.
#pragma once

#include <cstdint>

#include "threads.h"

namespace wscl {

enum class PointType { kFloat, kDouble, kHalf, kBfloat16 };

// `count` vectors of any of these types and strides (in elements).
struct Points {
  const void* data = nullptr;
  PointType type = PointType::kFloat;
  int64_t row_stride = 0, column_stride = 1;
  int64_t count = 0;
};

// The precision of the product that proposes candidates. Results do not depend on it.
enum class Candidates { kAuto, kFull, kBfloat16 };

// Beyond, so many of the nearest share a lane of the kernels' vectors that going through it costs too much.
constexpr int64_t kMostTop = 8;

template <class T>
struct KMeansProblem {
  Points x;                      // [n, d]
  const T* centroids = nullptr;  // [k, d], contiguous
  int64_t k = 0, d = 0;
  bool cosine = false;
  Candidates candidates = Candidates::kAuto;
  int64_t top = 1;  // nearest centroids wanted, at most kMostTop; 1 for an update

  int64_t* assignment = nullptr;  // [n, top]
  T* distance = nullptr;          // [n, top], at most the largest number of T

  // Of an update: null for an assignment alone.
  double* sums = nullptr;           // [k, d]
  const double* weights = nullptr;  // [n]; null: 1 each
  int64_t* counts = nullptr;        // [k], without weights
  double* weight_sums = nullptr;    // [k], with weights
  double* inertia = nullptr;
};

// Runs the pass. Returns −1, or the first row of x that is not finite; then the results mean nothing.
// Memory beyond the arguments: the centroids once more, and at most 64 MiB.
template <class T>
int64_t kmeans_pass(const KMeansProblem<T>& problem, const Threads& threads);

// The distance of each point from the centroid that `assignment` names: `distance`, and `inertia` where wanted.
template <class T>
void kmeans_distances(const KMeansProblem<T>& problem, const Threads& threads);

// Whether this processor, with the instruction set in use, has products of bfloat16.
bool has_bfloat16_candidates();

}  // namespace wscl
