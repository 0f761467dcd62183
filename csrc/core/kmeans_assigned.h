// What is done with rows whose clusters are known: their distances, their sums, and moving them from one sum to
// another (included by kmeans_bounds_kernel.h and kmeans_typed.h).
#pragma once

#include <cmath>

#include "kmeans_rows.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

// The distances of rows row … of x, at most kWidth, from their centroids, and their sum by weight.
template <class T>
WSCL_INLINE double own_distances(const KMeansProblem<T>& problem, const CentroidTable<T>& table,
                                 const T* direct, T* scratch, int64_t row, int64_t count, double* distance) {
  constexpr int kWidth = Simd<T>::kWidth;
  const bool squares = sizeof(T) == sizeof(float) && !table.cosine;  // float64 takes the exact distance anyway
  Vector<T> sums[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) sums[i] = Vector<T>{};
  const bool more = direct && row + 2 * kWidth <= problem.x.count;
  for (int64_t i = 0; squares && i < count; ++i) {
    const T* x =
        direct ? direct + (row + i) * problem.x.row_stride : fetch(problem.x, row + i, table.d, scratch);
    if (more)  // the next rows, on their way while these are used
      for (int64_t c = 0; c < table.d; c += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(x + kWidth * problem.x.row_stride + c, 0, 2);
    sums[i] = squares_of(x, table.centroids + problem.assignment[row + i] * table.d, table.d);
  }
  const Vector<T> squared = squares ? sums_of<T>(sums) : Vector<T>{};
  double inertia = 0;
  for (int64_t i = 0; i < count; ++i) {
    distance[i] = squared[i];
    if (!squares || !in_range_of_squares<T>(squared[i])) {
      const T* x = fetch(problem.x, row + i, table.d, scratch);
      distance[i] =
          exact_distance(table, x, table.cosine ? length_of(x, table.d) : 0, problem.assignment[row + i]);
    }
    inertia += (problem.weights ? problem.weights[row + i] : 1) * distance[i];
  }
  return inertia;
}

// Rows [row0, row1) of kmeans_distances; returns their inertia.
template <class T>
double kmeans_distances_part(const KMeansProblem<T>& problem, const CentroidTable<T>& table, int64_t row0,
                             int64_t row1) {
  constexpr int kWidth = Simd<T>::kWidth;
  Memory memory;
  T* scratch;
  memory.reserve(&scratch, table.d + kWidth);
  memory.allocate();
  double inertia = 0;
  for (int64_t row = row0; row < row1; row += kWidth) {
    const int64_t count = smaller(kWidth, row1 - row);
    double distance[kWidth];
    inertia += own_distances(problem, table, rows_of<T>(problem.x), scratch, row, count, distance);
    for (int64_t i = 0; i < count; ++i) problem.distance[row + i] = saturate<T>(distance[i]);
  }
  return inertia;
}

// Adds the rows of clusters [cluster0, cluster1) to the sums, once all are assigned.
template <class T>
void kmeans_sum(const KMeansProblem<T>& problem, int64_t cluster0, int64_t cluster1) {
  Memory memory;
  T* scratch;
  memory.reserve(&scratch, problem.d);
  memory.allocate();
  KMeansPart part = {0, problem.x.count, problem.sums, problem.counts, problem.weight_sums, 0, -1};
  for (int64_t row = 0; row < problem.x.count; ++row) {
    const int64_t cluster = problem.assignment[row];
    if (cluster < cluster0 || cluster >= cluster1) continue;
    const T* x = fetch(problem.x, row, problem.d, scratch);
    const double weight = problem.weights ? problem.weights[row] : 1;
    add_row(problem, x, cluster, weight, problem.cosine ? length_of(x, problem.d) : 0, part);
  }
}

// Columns [column0, column1) of a row, to the sums `to` of a cluster and from those of another, if any.
template <class T>
WSCL_INLINE void move_columns(const Addend<T>& addend, const T* x, int64_t column0, int64_t column1, double* to,
                              double* from, Vector<double>* largest) {
  constexpr int kWidth = Simd<double>::kWidth;
  int64_t c = column0;
  for (; c + kWidth <= column1; c += kWidth) {
    const Vector<double> value = addend.of(widen(x + c));
    *largest = larger_of<double>(*largest, larger_of<double>(value, -value));
    store(to + c, load(to + c) + value);
    if (from) store(from + c, load(from + c) - value);
  }
  for (; c < column1; ++c) {
    const double value = addend.of(double(x[c]));
    (*largest)[0] = std::fabs(value) > (*largest)[0] ? std::fabs(value) : (*largest)[0];
    to[c] += value;
    if (from) from[c] -= value;
  }
}

WSCL_INLINE double largest_lane(Vector<double> values) {
  double largest = 0;
  for (int i = 0; i < Simd<double>::kWidth; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

// Columns [column0, column1) of moved rows; returns the largest number among them.
template <class T>
double kmeans_move_rows(const BoundsProblem<T>& problem, const Moved* moved, int64_t count, int64_t column0,
                        int64_t column1) {
  Memory memory;
  T* scratch;
  memory.reserve(&scratch, problem.d + Simd<double>::kWidth);
  memory.allocate();
  Vector<double> largest = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* x = fetch(problem.x, moved[i].row, problem.d, scratch);
    const double weight = problem.weights ? problem.weights[moved[i].row] : 1;
    const Addend<T> addend(problem, weight, problem.cosine ? length_of(x, problem.d) : 0);
    double* to = problem.sums + problem.assignment[moved[i].row] * problem.d;
    double* from = moved[i].from < 0 ? nullptr : problem.sums + moved[i].from * problem.d;
    move_columns(addend, x, column0, column1, to, from, &largest);
  }
  return largest_lane(largest);
}

}  // namespace WSCL_ISA
}  // namespace wscl
