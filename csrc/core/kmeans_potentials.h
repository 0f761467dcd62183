// What k-means++ would gain by each of a few candidates, in one pass over the points. No torch, no Python.
//
//   distance_ji  = min(nearest_i, ‖s_i x_i − c_j‖²)
//   potential_j  = Σ_i w_i distance_ji
//
// Distances are taken from the differences: nothing cancels, wherever the origin is.
#pragma once

#include <cstdint>

#include "kmeans.h"

namespace wscl {

template <class T>
struct PotentialsProblem {
  Points x;                       // [n, d]
  const T* candidates = nullptr;  // [m, d], contiguous
  int64_t m = 0, d = 0;
  const T* scale = nullptr;         // [n]; null: 1 each
  const T* nearest = nullptr;       // [n]
  const double* weights = nullptr;  // [n]; null: 1 each

  T* distance = nullptr;        // [m, n]
  double* potential = nullptr;  // [m]
};

// Deterministic on a given number of threads.
template <class T>
void kmeans_potentials(const PotentialsProblem<T>& problem, const Threads& threads);

}  // namespace wscl
