// Lloyd's iteration with Hamerly's bounds on the CPU, in one pass over the points. No torch, no Python.
//
// Of each point a lower bound of its distance from any centroid but its own is kept. Centroids that moved
// loosen it by no more than the farthest of them went; the distance from the own centroid is taken anew, and
// while that is below the bound, or below half the distance from the own centroid to the next one, the nearest
// centroid is the same. The other points meet the centroids, those that moved farthest first, and leave as soon
// as the bound of what the rest moved tells that their own is the nearest.
//
// Source: Hamerly, Making k-means even faster, SDM 2010. New here: few centroids move far, and it is they that
// loosen bounds, so they are looked at before the others.
#pragma once

#include "kmeans.h"

namespace wscl {

// What a KMeansProblem has, with these changes: `assignment` is the last one, −1 for none, and renewed; so are
// `distance`, NaN where it is not known, since the point moved, and not read where there is no `previous`; and
// `sums`. `top` is 1. Distances are squares, or 1 − cos; bounds are lengths, of unit vectors for the cosine.
template <class T>
struct BoundsProblem : KMeansProblem<T> {
  T* lower = nullptr;           // [n], true for the last centroids; renewed
  const T* previous = nullptr;  // [k, d] the last centroids; null: there are none, and all points are searched
  const T* half = nullptr;      // [k] at most half the distance to the next centroid; null: not known
};

struct BoundedPass {
  int64_t changed = 0;   // points that went to another cluster
  int64_t searched = 0;  // those that met every centroid
  int64_t by_half = 0;   // those of which `half` alone told that they stay
  double peak = 0;       // the largest number that went in or out of the sums
  int64_t bad_row = -1;  // the first found that is not finite; then the results mean nothing
};

// Deterministic on a given number of threads. Memory beyond the arguments: as kmeans_pass, and 16 bytes a row.
template <class T>
BoundedPass kmeans_bounded_pass(const BoundsProblem<T>& problem, const Threads& threads);

}  // namespace wscl
