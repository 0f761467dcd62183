// The pass of kmeans_kernel.h where a row is the product's operand as it is: nothing is written, and nobody
// reads a row but the product and who adds it up (included by kmeans_typed.h).
//
// What a row's length told, its margin, is told by the distance from the column of the best score, which is
// needed anyway: ‖x‖ ≤ ‖x − c‖ + ‖c‖.
#pragma once

#include "kmeans_kernel.h"

namespace wscl {
namespace WSCL_ISA {

template <class Op>
struct InPlacePass : KMeansPass<Op> {
  using Base = KMeansPass<Op>;
  using T = typename Base::T;
  using Base::add_up, Base::block_rows, Base::check_finite, Base::decider, Base::part, Base::point,
      Base::problem, Base::states, Base::table;
  using Base::kInfinity, Base::kWidth;
  static constexpr bool kPossible = Is<T, typename Op::Element>::value && Base::kSquares;
  // Numbers of a row: longer ones share sets of L1, and their products repay writing them for.
  static constexpr int64_t kMost = 256;

  using Base::Base;

  static bool serves(const KMeansProblem<T>& problem, const CentroidTable<T>& table) {
    return rows_of<T>(problem.x) && table.as_they_are && table.depth == table.d && table.d <= kMost &&
           table.k > 1 && problem.top == 1;
  }

  void run() {
    Base::allocate();
    Base::rows_stride = problem.x.row_stride;
    for (int64_t row = part.row0; row < part.row1; row += block_rows) {
      const int64_t count = smaller(block_rows, part.row1 - row);
      Base::rows = point(row);
      Base::score(row, count);
      for (int64_t i = 0; i < count; i += kWidth)
        if (!finish(row, i, smaller(kWidth, count - i))) return;
    }
  }

  // Decides rows row0 + first …, and adds them up; false where one is not finite.
  bool finish(int64_t row0, int64_t first, int64_t count) {
    const RowState<T>* state = states + first;
    const int64_t row = row0 + first;
    Vector<T> best[kWidth], second[kWidth], squares[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {  // of rows beyond count too: their own memory
      best[i] = state[i].best;
      second[i] = state[i].second;
      squares[i] = Vector<T>{};
    }
    fold_best_two<T>(best, second);
    T score[kWidth], least[kWidth];
    store(score, best[0]);
    int64_t nearest[kWidth];
    for (int64_t i = 0; i < count; ++i) {
      // Of a row so far out that no product is a number the best may be a column beyond the last.
      const int lane = __builtin_ctz(at_least<T>(state[i].best, broadcast(score[i])));
      nearest[i] = smaller(decider.nearest_in(state[i], lane), table.k - 1);
      const T* centroid = table.centroids + nearest[i] * table.d;
      squares[i] = squares_of(point(row + i), centroid, table.d);
    }
    Vector<T> squared = sums_of<T>(squares);
    const Vector<T> norms = T(1.001) * (square_root<T>(squared) + T(table.longest));
    const Vector<T> lowest = best[0] - T(2.001) * (T(table.per_norm) * norms + T(table.constant));
    store(least, lowest);
    // NaN is not below either.
    const uint32_t clear = at_least<T>(lowest, second[0]) & ~at_least<T>(second[0], lowest) &
                           at_least<T>(broadcast(T(1e30)), squared);
    for (uint32_t rest = ~clear & ((uint64_t(1) << count) - 1); rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      if (!(squared[i] < T(1e30))) {  // too far out for the product: every centroid is looked at
        if (!check_finite(row + i)) return false;
        least[i] = -kInfinity;
      }
      double other;
      const int64_t found = decider.closer_look(point(row + i), 0, state[i], least[i], &other);
      if (found == nearest[i]) continue;
      nearest[i] = found;
      for (int e = 0; e < kWidth; ++e) squares[e] = Vector<T>{};
      squares[i] = squares_of(point(row + i), table.centroids + found * table.d, table.d);
      squared[i] = sums_of<T>(squares)[i];
    }
    for (int64_t i = 0; i < count; ++i) problem.assignment[row + i] = nearest[i];
    add_up(row, first, count, nearest, squared);
    return true;
  }
};

template <class Op>
void kmeans_run(const KMeansProblem<typename Op::Number>& problem,
                const CentroidTable<typename Op::Number>& table, KMeansPart& part) {
  const KeepsSubnormals keeps;
  if constexpr (InPlacePass<Op>::kPossible)
    if (InPlacePass<Op>::serves(problem, table)) return InPlacePass<Op>(problem, table, part).run();
  KMeansPass<Op>(problem, table, part).run();
}

}  // namespace WSCL_ISA
}  // namespace wscl
