// From the best scores of a row to its nearest centroids (included by kmeans_kernel.h).
//
// Where only one centroid's score is within twice the error bound of the best, that is the nearest.
// Else those that are have their distances taken from the differences in T, and where these leave more than
// one, in float64; a lane whose second best is among them is gone through as a whole, since it keeps only one
// column's number.
#pragma once

#include "kmeans_rows.h"
#include "kmeans_tile.h"

namespace wscl {
namespace WSCL_ISA {

template <class T>
struct Decider {
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();
  static constexpr bool kSquares = sizeof(T) == sizeof(float);  // float64 takes the exact distance anyway

  const CentroidTable<T>& table;

  // The nearest centroid, or −1 where it takes a closer look.
  WSCL_INLINE int64_t decided(const RowState<T>& state, T least) const {
    const uint32_t lanes = at_least<T>(state.best, broadcast(least));
    if (lanes & (lanes - 1) || at_least<T>(state.second, broadcast(least))) return -1;
    return nearest_in(state, __builtin_ctz(lanes));
  }

  WSCL_INLINE int64_t nearest_in(const RowState<T>& state, int lane) const {
    return table.centroid(static_cast<int64_t>(state.vector[lane]) * kWidth + lane);
  }

  // The nearest of the centroids whose score is at least `least`; none of the others among them is nearer than
  // `second`, a distance as the problem has it.
  int64_t closer_look(const T* x, double own_length, const RowState<T>& state, T least, double* second) const {
    if (kSquares && !table.cosine) {
      const int64_t found = nearest_by_squares(x, state, least, second);
      if (found >= 0) return found;
    }
    int64_t nearest[2];
    double distance[2] = {kInfinity, kInfinity};
    decide(x, own_length, state, least, 2, nearest, distance);
    *second = distance[1];
    return nearest[0];
  }

  // The same by ‖x − c‖² in T. Nothing cancels there: a difference is off by u of itself, its square by 3 u,
  // their sum in any order by (d + 3) u of the sum. Those within twice that of the least are told apart in
  // float64; −1 where they are many, or out of T's range.
  int64_t nearest_by_squares(const T* x, const RowState<T>& state, T least, double* second) const {
    constexpr int kMost = 16;
    const T grow = 1 + T(2.01) * T(table.d + 8) * (sizeof(T) == sizeof(float) ? T(0x1p-23) : T(0x1p-52));
    int64_t kept[kMost];
    T square[kMost], lowest = kInfinity, next = kInfinity;
    int count = 0;
    const auto prune = [&] {
      int left = 0;
      for (int i = 0; i < count; ++i)
        if (square[i] <= lowest * grow) {
          kept[left] = kept[i];
          square[left++] = square[i];
        }
      count = left;
    };
    const auto consider = [&](int64_t j) {
      const T s = horizontal_sum<T>(squares_of(x, table.centroids + j * table.d, table.d));
      if (s < lowest)
        next = lowest;
      else if (s < next)
        next = s;
      if (!(s <= lowest * grow)) return true;
      lowest = s < lowest ? s : lowest;
      if (count == kMost) prune();
      if (count == kMost) return false;
      kept[count] = j;
      square[count++] = s;
      return true;
    };
    const uint32_t one = at_least<T>(state.best, broadcast(least));
    const uint32_t many = at_least<T>(state.second, broadcast(least));
    for (uint32_t lanes = one; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (many >> lane & 1) {
        for (int64_t j = lane; j < table.k; j += kWidth)
          if (!consider(table.centroid(j))) return -1;
      } else if (!consider(nearest_in(state, lane))) {
        return -1;
      }
    }
    if (!in_range_of_squares<T>(lowest)) return -1;
    *second = next / grow;
    prune();
    int64_t nearest = kept[0];
    double distance = count > 1 ? exact_distance(table, x, 0, nearest) : 0;
    for (int i = 1; i < count; ++i) {
      const double other = exact_distance(table, x, 0, kept[i]);
      if (other < distance || (other == distance && kept[i] < nearest)) {
        nearest = kept[i];
        distance = other;
      }
    }
    return nearest;
  }

  // The `top` nearest of the centroids whose score is at least `least`, and their distances, in float64.
  void decide(const T* x, double own_length, const RowState<T>& state, T least, int64_t top, int64_t* nearest,
              double* distance) const {
    const uint32_t one = at_least<T>(state.best, broadcast(least));
    const uint32_t many = at_least<T>(state.second, broadcast(least));
    int64_t found = 0;
    const auto consider = [&](int64_t j) {
      const double candidate = exact_distance(table, x, own_length, j);
      int64_t place = found < top ? found++ : top;  // as if behind the last
      for (; place > 0; --place) {
        const double before = distance[place - 1];
        if (before < candidate || (before == candidate && nearest[place - 1] < j)) break;
        if (place < top) {
          nearest[place] = nearest[place - 1];
          distance[place] = before;
        }
      }
      if (place >= top) return;
      nearest[place] = j;
      distance[place] = candidate;
    };
    for (int lane = 0; lane < kWidth; ++lane) {
      if (many >> lane & 1)
        for (int64_t j = lane; j < table.k; j += kWidth) consider(table.centroid(j));
      else if (one >> lane & 1)
        consider(nearest_in(state, lane));
    }
  }
};

}  // namespace WSCL_ISA
}  // namespace wscl
