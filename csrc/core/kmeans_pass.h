// What the driver of k-means (kmeans.cpp) and the kernels of each instruction set share.
#pragma once

#include "kmeans.h"
#include "kmeans_bounds.h"
#include "kmeans_potentials.h"

namespace wscl {

// Vectors of columns whose numbers go into the low bits of scores at a time.
constexpr int64_t kGroupVectors = 256;

// The centroids as the product sees them, prepared once and shared by all threads:
//
//   score_ij = p_i · q_j − offset_j,   p_i = (x_i − origin) · scale,   q_j = (c_j − origin) · scale
//
// is highest for the nearest centroid (offset_j = ‖q_j‖² / 2; for the cosine, of unit vectors, −origin · q_j).
// Seen from the middle of the centroids, and scaled by a power of two so that the largest number of q is in
// [½, 1), the product keeps its digits far from zero and nothing overflows but what is very far out. Where the
// middle is near zero anyway, and the numbers of a common size, points are taken as they are: p = x, q = c.
template <class T>
struct CentroidTable {
  const T* centroids = nullptr;  // [k, d]
  int64_t k = 0, d = 0;
  int64_t depth = 0;  // d as the product sees it, a multiple of the operands' step
  // Columns that would leave most of the last vector empty take several of its lanes each, and that part of the
  // multiply-adds: 4 columns of 100 cost a quarter of a vector, not one. 1: there are none.
  int64_t terms = 1;
  bool cosine = false;
  const T* origin = nullptr;  // [d]
  T scale = 1;
  bool as_they_are = false;        // origin 0, scale 1
  const int64_t* order = nullptr;  // [k] the centroid that is column j of the product; null: the j-th
  const void* panels = nullptr;    // the q_j in panels of columns, in the product's precision
  int64_t block_bytes = 0;         // of the rows that meet all panels in turn
  const T* offset = nullptr;       // [columns], beyond k so large that they are never the nearest
  int index_bits = 0;              // of a score, that give way to the number of its vector in a group
  const double* length = nullptr;  // [k] ‖c‖, for the cosine
  // |score − its exact value| ≤ per_norm · ‖p‖ + per_loss · ‖p − p̃‖ + constant, p̃ being p as rounded
  double per_norm = 0, per_loss = 0, constant = 0;
  double longest = 0;  // ‖q‖

  int64_t centroid(int64_t column) const {
    return order ? order[column] : column;
  }
};

// How far the centroids moved, the farthest first.
template <class T>
struct Movement {
  const int64_t* order = nullptr;  // [k] centroids
  const int64_t* place = nullptr;  // [k] where each of them comes in `order`
  int64_t count = 0;               // of centroids that moved at all
  const T* length = nullptr;       // [k + 2] at least how far the centroids in `order` moved; 0 behind them
};

// A row that went from one cluster, or none (−1), to another.
struct Moved {
  int64_t row, from;
};

// What one thread makes of a pass with bounds.
struct BoundedPart {
  int64_t number, count;  // this part among all
  int64_t* counts = nullptr;
  double* weight_sums = nullptr;
  Moved* moved = nullptr;  // as many as the part has rows; the pass fills n_moved of them
  double* sums = nullptr;  // [k, d], zero at first, of rows that had no cluster; null: they are in `moved` too
  int64_t n_moved = 0, changed = 0, searched = 0, by_half = 0;
  double inertia = 0, peak = 0;  // peak: the largest number that went into `sums`
  int64_t bad_row = -1;

  // Parts take turns, so that sorted data are no more work for one than for another.
  static constexpr int64_t kTurn = 2048;
};

// Rows [row0, row1) of a pass.
struct KMeansPart {
  int64_t row0, row1;
  double* sums;         // [k, d], zero at first; null: nothing is summed
  int64_t* counts;      // [k]
  double* weight_sums;  // [k]
  double inertia;
  int64_t bad_row;  // −1
};

// One instruction set's kernels, with a product of one precision.
template <class T>
struct KMeansTyped {
  // `count` rows of q [count][d] as a panel of `vectors` vectors of columns with this many terms each, zero
  // beyond.
  void (*pack)(const T* rows, int64_t count, int64_t vectors, int64_t terms, int64_t d, int64_t depth,
               void* panel);
  void (*run)(const KMeansProblem<T>&, const CentroidTable<T>&, KMeansPart&);
  // Adds the rows of clusters [cluster0, cluster1) to the problem's sums and counts.
  void (*sum)(const KMeansProblem<T>&, int64_t cluster0, int64_t cluster1);
  // Rows [row0, row1) of kmeans_distances; returns their inertia.
  double (*distances)(const KMeansProblem<T>&, const CentroidTable<T>&, int64_t row0, int64_t row1);
  // Rows [row0, row1) of kmeans_potentials, added to potential [m].
  void (*potentials)(const PotentialsProblem<T>&, int64_t row0, int64_t row1, double* potential);
  void (*bounded)(const BoundsProblem<T>&, const CentroidTable<T>&, const Movement<T>&, BoundedPart&);
  // Columns [column0, column1) of moved rows, from the sums of one cluster to those of the other; returns the
  // largest number among them.
  double (*move)(const BoundsProblem<T>&, const Moved*, int64_t count, int64_t column0, int64_t column1);
  int64_t vectors;       // of a panel; the last may have one
  int64_t width;         // columns of a vector
  int64_t stretch;       // depth is a multiple of this, times the terms
  int64_t most_terms;    // of a column
  int64_t element_size;  // of the packed operand
};

struct KMeansKernels {
  const char* name;
  KMeansTyped<float> of_float;
  KMeansTyped<double> of_double;
};

extern const KMeansKernels kKMeansPortable;
#if defined(__x86_64__)
extern const KMeansKernels kKMeansAvx2;
extern const KMeansKernels kKMeansAvx512;
extern const KMeansTyped<float> kKMeansAvx512Bfloat16;
extern const KMeansTyped<float> kKMeansAvx512Amx;
#endif

}  // namespace wscl
