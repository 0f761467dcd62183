// The pass of kmeans_bounds.h for one instruction set (included by kmeans_typed.h).
//
// Tile map. A thread takes its rows as they lie, reads each once and takes its distance from its own centroid:
// what makes an iteration in which nothing changes. Rows that the bounds do not decide are listed; when they
// are a block, they are written and scored as kmeans_kernel.h does, but in stages: the first 32 columns, then
// four times as many, and so on. Between stages rows that are decided leave, and the others close up.
#pragma once

#include "kmeans_kernel.h"

namespace wscl {
namespace WSCL_ISA {

// Lane i of *best and *second become the two largest of all lanes of best[i] and second[i], which are used up.
template <class T, int kCount = Simd<T>::kWidth>
WSCL_INLINE void fold_best_two(Vector<T>* best, Vector<T>* second) {
  if constexpr (kCount > 1) {
    constexpr int kWidth = Simd<T>::kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      const Vector<T> a = best[i], b = best[i + kCount / 2], c = second[i], d = second[i + kCount / 2];
      const Vector<T> low = shuffle<T>(a, b, Interleave<kWidth, 0>()),
                      high = shuffle<T>(a, b, Interleave<kWidth, 1>());
      best[i] = larger_of<T>(low, high);
      second[i] = larger_of<T>(minimum<T>(low, high), larger_of<T>(shuffle<T>(c, d, Interleave<kWidth, 0>()),
                                                                   shuffle<T>(c, d, Interleave<kWidth, 1>())));
    }
    fold_best_two<T, kCount / 2>(best, second);
  }
}

template <class Op>
struct BoundedRows : KMeansPass<Op> {
  using Base = KMeansPass<Op>;
  using T = typename Base::T;
  using Base::block_rows, Base::decider, Base::direct, Base::length, Base::margin, Base::norm, Base::point,
      Base::states, Base::table, Base::vectors;
  static constexpr int kWidth = Base::kWidth;
  static constexpr bool kSquares = Base::kSquares;
  static constexpr int64_t kFirstStage = 2, kGrowth = 4;  // vectors of columns
  // Stages are for when more of the product than this could be saved; else a full search, which makes bounds
  // new.
  static constexpr double kLeastGain = 0.35;

  const BoundsProblem<T>& problem;
  const Movement<T>& movement;
  BoundedPart& out;
  const T eps = sizeof(T) == sizeof(float) ? T(0x1p-23) : T(0x1p-52);
  const T up = 1 + 4 * eps, down = 1 - 4 * eps;
  const T growth, slack;  // what a distance may be too short by: relative, and when cosine absolute
  double square_shift = 0, square_slack = 0;  // of the square of a distance from its score
  int64_t rows_seen = 0, count = 0;
  Memory memory;
  int64_t* row;      // [block_rows] the listed rows
  int64_t* slot;     // [block_rows] where those that are still searched lie in the block
  double* distance;  // [block_rows] of the listed rows from their own centroids
  T* upper;          // [block_rows] no less than that, as a length
  T* own_scratch;    // [d]

  BoundedRows(const BoundsProblem<T>& problem, const CentroidTable<T>& table, const Movement<T>& movement,
              KMeansPart& part, BoundedPart& out)
      : Base(problem, table, part),
        problem(problem),
        movement(movement),
        out(out),
        growth(1 + (T(table.d) / 2 + 4) * eps),
        slack(table.cosine ? 8 * eps : 0) {
    if (table.cosine) {  // ‖p − q‖² = s² − ‖origin‖² + ‖p‖² − 2 score where p + origin and q + origin have
                         // length s
      double origin = 0;
      const double s = table.scale;
      for (int64_t c = 0; c < table.d; ++c) origin += double(table.origin[c]) * table.origin[c] * s * s;
      square_shift = s * s - origin;
      square_slack = 32 * double(eps) * (s * s + origin) + table.d * double(eps) * s * std::sqrt(origin);
    }
    memory.reserve(&row, block_rows);
    memory.reserve(&slot, block_rows);
    memory.reserve(&distance, block_rows);
    memory.reserve(&upper, block_rows);
    memory.reserve(&own_scratch, table.d + kWidth);
    memory.allocate();
  }

  void run() {
    const int64_t n = problem.x.count, turn = BoundedPart::kTurn;
    for (int64_t begin = out.number * turn; begin < n; begin += out.count * turn) {
      const int64_t end = smaller(n, begin + turn);
      for (int64_t i = begin; i < end; i += kWidth) {
        if (count + kWidth > block_rows && !search()) return;
        look(i, smaller(kWidth, end - i));
      }
    }
    search();
  }

  // Takes the distances of rows first …, and lists those that the bounds do not decide.
  WSCL_INLINE void look(int64_t first, int64_t n) {
    rows_seen += n;
    if (!problem.previous) {
      for (int64_t i = 0; i < n; ++i) row[count++] = first + i;
      return;
    }
    double apart[kWidth];
    own_distances(problem, table, direct, own_scratch, first, n, apart);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = first + i, own = problem.assignment[r];
      const double square = table.cosine ? 2 * apart[i] : apart[i];
      const T most =
          (square > 1e-30 ? std::sqrt(static_cast<T>(square)) : static_cast<T>(std::sqrt(square))) * growth +
          slack;
      const T lower = loosened(r, own, 0);
      problem.lower[r] = lower;
      if (most < lower || (problem.half && most < problem.half[own])) {
        out.by_half += !(most < lower);
        keep(r, own, apart[i]);
        continue;
      }
      row[count] = r;
      distance[count] = apart[i];
      upper[count++] = most;
    }
  }

  // The bound of row r as far as centroids are concerned that come from `first` on in the order of movement.
  WSCL_INLINE T loosened(int64_t r, int64_t own, int64_t first) const {
    const T moved = movement.length[first + (movement.order[first] == own)];
    const T lower = problem.lower[r] - moved;
    return lower - std::fabs(lower) * 4 * eps;
  }

  // Row r belongs to cluster `own`, at this distance.
  WSCL_INLINE void keep(int64_t r, int64_t own, double apart) {
    problem.distance[r] = saturate<T>(apart);
    const double weight = problem.weights ? problem.weights[r] : 1;
    out.inertia += weight * apart;
    if (out.weight_sums)
      out.weight_sums[own] += weight;
    else
      ++out.counts[own];
  }

  // At most the distance, as a length, of the row at `at` in the block from a centroid of no higher score.
  WSCL_INLINE T bound_of(int64_t at, T score) const {
    const double square = square_shift + norm[at] * (1 - (table.d + 32) * double(eps)) - 2 * double(score) -
                          double(margin[at]) - 8 * double(eps) * std::fabs(score) - square_slack;
    const double bound = std::sqrt(square > 0 ? square : 0.) / table.scale;  // of NaN 0
    return static_cast<T>(bound < 1e38 ? bound : 1e38) * down - slack;
  }

  // Searches the listed rows; false where one is not finite.
  bool search() {
    const int64_t listed = count, columns = table.k;
    count = 0;
    for (int64_t i = 0; i < listed; i += kWidth)
      if (!Base::write_rows([&](int64_t e) { return row[e]; }, i, smaller(kWidth, listed - i))) {
        out.bad_row = Base::part.bad_row;
        return false;
      }
    for (int64_t i = 0; i < listed; ++i) slot[i] = i;
    const int64_t first = kFirstStage * kWidth;
    const bool staged = problem.previous && columns > first &&
                        double(listed) * (columns - first) > kLeastGain * double(rows_seen) * columns;
    int64_t left = listed, stage = staged ? kFirstStage : vectors;
    for (int64_t v = 0; v < vectors && left > 0;) {
      const int64_t last = smaller(smaller(stage, vectors), v + kGroupVectors);
      Base::score_group(v, last, left, [&](int64_t i) { return slot[i]; }, [](int64_t) {});
      v = last;
      if (v < stage || v >= vectors) continue;
      left = leave(left, v * kWidth);
      stage *= kGrowth;
    }
    for (int64_t i = 0; i < left; i += kWidth) finish_searched(i, smaller(kWidth, left - i));
    out.searched += left;
    rows_seen = 0;
    return true;
  }

  WSCL_INLINE void best_two(int64_t first, T* best, T* second) const {
    Vector<T> a[kWidth], b[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {  // of rows beyond the last too: their own memory
      a[i] = states[first + i].best;
      b[i] = states[first + i].second;
    }
    fold_best_two<T>(a, b);
    store(best, a[0]);
    store(second, b[0]);
  }

  // After the first `seen` columns: rows that are decided leave; returns how many are left.
  int64_t leave(int64_t before, int64_t seen) {
    int64_t left = 0;
    for (int64_t first = 0; first < before; first += kWidth) {
      T best[kWidth], second[kWidth];
      best_two(first, best, second);
      for (int64_t i = first; i < smaller(first + kWidth, before); ++i) {
        const int64_t at = slot[i], r = row[at], own = problem.assignment[r];
        // Where the own centroid was met, it is the best, or the second is no farther than it.
        const T met = bound_of(at, movement.place[own] < seen ? second[i - first] : best[i - first]);
        T rest = last_bound(r, own, seen);
        rest = rest < met ? rest : met;
        if (upper[at] < rest) {
          problem.lower[r] = rest;
          keep(r, own, distance[at]);
        } else {
          slot[left] = at;
          states[left++] = states[i];
        }
      }
    }
    return left;
  }

  // look() has taken off what the farthest moved; the columns from `first` on moved less.
  WSCL_INLINE T last_bound(int64_t r, int64_t own, int64_t first) const {
    const T taken = movement.length[movement.order[0] == own];
    const T moved = movement.length[first + (movement.order[first] == own)];
    const T lower = problem.lower[r] + (taken - moved);
    return lower - (std::fabs(lower) + taken) * 4 * eps;
  }

  // Decides rows first … of those that met every column.
  void finish_searched(int64_t first, int64_t n) {
    T best[kWidth], second[kWidth];
    best_two(first, best, second);
    Vector<T> squares[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) squares[i] = Vector<T>{};
    int64_t nearest[kWidth];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = slot[first + i], r = row[at];
      const RowState<T>& state = states[first + i];
      T least = best[i] - margin[at];
      if (!(least > -Base::kInfinity)) least = -Base::kInfinity;  // ∞ − ∞ too
      nearest[i] = decider.decided(state, least);
      if (nearest[i] >= 0) {
        problem.lower[r] = bound_of(at, second[i]);
      } else {
        double next;
        nearest[i] = decider.closer_look(point(r), length[at], state, least, &next);
        const double other = std::sqrt(table.cosine ? 2 * next : next);
        const T near = static_cast<T>(other < 1e38 ? other : 1e38) * (1 - 8 * eps) - slack;
        const T far = bound_of(at, least);  // of those that were not looked at
        problem.lower[r] = near < far ? near : far;
      }
      if (kSquares && !table.cosine && (!problem.previous || nearest[i] != problem.assignment[r]))
        squares[i] = squares_of(point(r), table.centroids + nearest[i] * table.d, table.d);
    }
    const Vector<T> squared = sums_of<T>(squares);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = slot[first + i], r = row[at], own = problem.assignment[r];
      const bool known = problem.previous && nearest[i] == own;
      double apart = known ? distance[at] : double(squared[i]);
      if (!known && (!kSquares || table.cosine || !in_range_of_squares<T>(squared[i])))
        apart = exact_distance(table, point(r), length[at], nearest[i]);
      if (nearest[i] != own) {
        out.moved[out.n_moved++] = {r, own};
        problem.assignment[r] = nearest[i];
      }
      keep(r, nearest[i], apart);
    }
  }
};

template <class Op>
void kmeans_bounded_run(const BoundsProblem<typename Op::Number>& problem,
                        const CentroidTable<typename Op::Number>& table,
                        const Movement<typename Op::Number>& movement, BoundedPart& out) {
  const KeepsSubnormals keeps;
  KMeansPart part = {0, 0, nullptr, nullptr, nullptr, 0, -1};
  BoundedRows<Op>(problem, table, movement, part, out).run();
}

// Columns [column0, column1) of moved rows; returns the largest number among them.
template <class T>
double kmeans_move_rows(const BoundsProblem<T>& problem, const Moved* moved, int64_t count, int64_t column0,
                        int64_t column1) {
  constexpr int kWidth = Simd<double>::kWidth;
  Memory memory;
  T* scratch;
  memory.reserve(&scratch, problem.d + kWidth);
  memory.allocate();
  Vector<double> largest = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* x = fetch(problem.x, moved[i].row, problem.d, scratch);
    const double weight = problem.weights ? problem.weights[moved[i].row] : 1;
    const Addend<T> addend(problem, weight, problem.cosine ? length_of(x, problem.d) : 0);
    double* to = problem.sums + problem.assignment[moved[i].row] * problem.d;
    double* from = moved[i].from < 0 ? nullptr : problem.sums + moved[i].from * problem.d;
    int64_t c = column0;
    for (; c + kWidth <= column1; c += kWidth) {
      const Vector<double> value = addend.of(widen(x + c));
      largest = larger_of<double>(largest, larger_of<double>(value, -value));
      store(to + c, load(to + c) + value);
      if (from) store(from + c, load(from + c) - value);
    }
    for (; c < column1; ++c) {
      const double value = addend.of(double(x[c]));
      largest[0] = std::fabs(value) > largest[0] ? std::fabs(value) : largest[0];
      to[c] += value;
      if (from) from[c] -= value;
    }
  }
  double peak = 0;
  for (int i = 0; i < kWidth; ++i) peak = largest[i] > peak ? largest[i] : peak;
  return peak;
}

}  // namespace WSCL_ISA
}  // namespace wscl
