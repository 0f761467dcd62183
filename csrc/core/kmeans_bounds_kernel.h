// The pass of kmeans_bounds.h for one instruction set (included by kmeans_typed.h).
//
// Tile map. A thread takes its rows as they lie, reads each once and takes its distance from its own centroid:
// what makes an iteration in which nothing changes. Rows that the bounds do not decide are listed; when they
// are a block, they are written and scored as kmeans_kernel.h does, but in stages: the first 32 columns, then
// four times as many, and so on. Between stages rows that are decided leave, and the others close up.
#pragma once

#include "kmeans_assigned.h"
#include "kmeans_kernel.h"

namespace wscl {
namespace WSCL_ISA {

template <class Op>
struct BoundedRows : KMeansPass<Op> {
  using Base = KMeansPass<Op>;
  using T = typename Base::T;
  using Base::block, Base::block_rows, Base::decider, Base::direct, Base::length, Base::margin, Base::memory,
      Base::norm, Base::point, Base::states, Base::stride, Base::table, Base::vectors;
  using typename Base::Element;
  static constexpr int kWidth = Base::kWidth;
  static constexpr bool kSquares = Base::kSquares;
  static constexpr int64_t kFirstStage = 2, kGrowth = 4;  // vectors of columns
  // Stages are for when more of the product than this could be saved; else a full search renews the bounds.
  static constexpr double kLeastGain = 0.35;
  static constexpr double kBlind = 0.9;  // share of rows that are searched all the same
  static constexpr int64_t kLookAgain = 8;

  const BoundsProblem<T>& problem;
  const Movement<T>& movement;
  BoundedPart& out;
  const T eps = sizeof(T) == sizeof(float) ? T(0x1p-23) : T(0x1p-52);
  const T down = 1 - 4 * eps;
  const T growth, slack;  // what a distance may be too short by: relative, and when cosine absolute
  T square_shift = 0, square_slack = 0;  // of the square of a distance from its score
  Vector<double> safe_inertia = {};      // of rows that the bounds decided, several at a time
  Vector<double> largest_joined = {};    // numbers of rows that had no cluster before
  int64_t rows_seen = 0, count = 0;
  bool blind = false;              // the rows that are listed have not been looked at
  int64_t unlooked = 0;            // searches of such rows
  int64_t next = 0, turn_end = 0;  // rows that come next, up to the end of this turn
  int64_t* row;                    // [block_rows] the listed rows
  int64_t* slot;                   // [block_rows] which of them the block's rows, those still searched, are
  double* distance;                // [block_rows] of the listed rows from their own centroids
  T* upper;                        // [block_rows] no less than that, as a length

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
      square_shift = static_cast<T>(s * s - origin);
      square_slack =
          static_cast<T>(40 * double(eps) * (s * s + origin) + table.d * double(eps) * s * std::sqrt(origin));
    }
    memory.reserve(&row, block_rows);
    memory.reserve(&slot, block_rows);
    memory.reserve(&distance, block_rows);
    memory.reserve(&upper, block_rows);
  }

  void run() {
    Base::allocate();
    const int64_t n = problem.x.count, turn = BoundedPart::kTurn;
    for (int64_t begin = out.number * turn; begin < n; begin += out.count * turn) {
      const int64_t end = smaller(n, begin + turn);
      turn_end = end;
      for (next = begin; next < end; next += kWidth) {
        if (count + kWidth > block_rows && !search()) return;
        look(next, smaller(kWidth, end - next));
      }
    }
    search();
    out.inertia += horizontal_sum<double>(safe_inertia);
    out.peak = largest_lane(largest_joined);
  }

  // Takes the distances of rows first …, and lists those that the bounds do not decide.
  WSCL_INLINE void look(int64_t first, int64_t n) {
    rows_seen += n;
    if (!problem.previous || blind) {
      for (int64_t i = 0; i < n; ++i) row[count++] = first + i;
      return;
    }
    if (kSquares && !table.cosine && n == kWidth && look_at_all(first)) return;
    double apart[kWidth];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = first + i;
      if (!own_moved(r) && in_range_of_squares<T>(problem.distance[r]))  // NaN, or short of digits: not known
        apart[i] = problem.distance[r];
      else
        own_distances(problem, table, direct, Base::scratch, r, 1, apart + i);
    }
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

  // Whether row r's own centroid moved, so that its distance from it is another than in the last pass.
  WSCL_INLINE bool own_moved(int64_t r) const {
    return movement.place[problem.assignment[r]] < movement.count;
  }

  // look() for kWidth rows at once, of which x is read only where the own centroid moved; false, with nothing
  // done, where a square leaves T's range.
  WSCL_INLINE bool look_at_all(int64_t first) {
    const int64_t* own = problem.assignment + first;
    Vector<T> squares[kWidth];
    uint32_t anew = 0;
    for (int i = 0; i < kWidth; ++i) {
      squares[i] = Vector<T>{};
      if (!own_moved(first + i)) continue;
      anew |= 1u << i;
      squares[i] = squares_of(point(first + i), table.centroids + own[i] * table.d, table.d);
    }
    if (first + 2 * kWidth <= turn_end)
      for (int i = 0; i < kWidth; ++i)
        if (own_moved(first + kWidth + i)) Base::prefetch_row(first + kWidth + i);
    T apart[kWidth];
    store(apart, load(problem.distance + first));
    if (anew) {
      T taken[kWidth];
      store(taken, sums_of<T>(squares));
      for (int i = 0; i < kWidth; ++i) apart[i] = anew >> i & 1 ? taken[i] : apart[i];
    }
    const Vector<T> square = load(apart);
    if (!all_in_range_of_squares<T>(square)) return false;
    const int64_t farthest = movement.order[0];
    const T most_moved = movement.length[0], others_moved = movement.length[1];
    T moved[kWidth], halves[kWidth];
    for (int i = 0; i < kWidth; ++i) moved[i] = own[i] == farthest ? others_moved : most_moved;
    Vector<T> lower = load(problem.lower + first) - load(moved);
    lower -= larger_of<T>(lower, -lower) * (4 * eps);
    store(problem.lower + first, lower);
    const Vector<T> most = square_root<T>(square) * growth;
    const uint32_t by_bound = at_least<T>(lower, most);  // both are rounded outwards: equal is safe
    uint32_t safe = by_bound;
    if (problem.half) {
      for (int i = 0; i < kWidth; ++i) halves[i] = problem.half[own[i]];
      safe |= at_least<T>(load(halves), most);
      out.by_half += __builtin_popcount(safe & ~by_bound);
    }
    store(problem.distance + first, square);
    if (safe != kAllLanes<T>) {
      T lengths[kWidth];
      store(lengths, most);
      for (uint32_t rest = kAllLanes<T> & ~safe; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (!(anew >> i & 1)) Base::prefetch_row(first + i);
        row[count] = first + i;
        distance[count] = apart[i];
        upper[count++] = lengths[i];
        apart[i] = 0;
      }
    }
    if (const double* weights = problem.weights) {
      weights += first;
      for (int i = 0; i < kWidth; i += Simd<double>::kWidth)
        safe_inertia += load(weights + i) * widen(apart + i);
      for (int i = 0; i < kWidth; ++i)
        if (safe >> i & 1) out.weight_sums[own[i]] += weights[i];
    } else {
      for (int i = 0; i < kWidth; i += Simd<double>::kWidth) safe_inertia += widen(apart + i);
      for (int i = 0; i < kWidth; ++i) out.counts[own[i]] += safe >> i & 1;
    }
    return true;
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

  // Row r had no cluster before: still in the cache, it is added to this part's own sums.
  WSCL_INLINE void join(int64_t r, int64_t cluster, double own_length) {
    const Addend<T> addend(problem, problem.weights ? problem.weights[r] : 1, own_length);
    move_columns(addend, point(r), 0, table.d, out.sums + cluster * table.d, nullptr, &largest_joined);
  }

  // At most the distances, as lengths, of rows of these norms and margins from centroids of no higher scores.
  WSCL_INLINE Vector<T> bounds_of(Vector<T> norms, Vector<T> margins, Vector<T> scores) const {
    const Vector<T> size = larger_of<T>(scores, -scores), most = broadcast(T(1e38));
    const Vector<T> square = square_shift + norms * (1 - (T(table.d) + 32) * eps) - 2 * scores - margins -
                             8 * eps * size - square_slack;
    const Vector<T> length = square_root<T>(larger_of<T>(square, Vector<T>{})) / table.scale;  // of NaN 0
    return minimum<T>(length, most) * down - slack;
  }

  // What bounds_of() takes of the rows in slots first …
  WSCL_INLINE void load_slots(int64_t first, int64_t n, Vector<T>* norms, Vector<T>* margins) const {
    T of_rows[2][kWidth] = {};
    for (int64_t i = 0; i < n; ++i) {
      of_rows[0][i] = norm[slot[first + i]];
      of_rows[1][i] = margin[slot[first + i]];
    }
    *norms = load(of_rows[0]);
    *margins = load(of_rows[1]);
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
    const bool staged = problem.previous && !blind && columns > first &&
                        double(listed) * (columns - first) > kLeastGain * double(rows_seen) * columns;
    int64_t left = listed, stage = staged ? kFirstStage : vectors;
    for (int64_t v = 0; v < vectors && left > 0;) {
      const int64_t last = smaller(smaller(stage, vectors), v + kGroupVectors);
      Base::score_group(v, last, left, [&](int64_t i) {
        if (next + i < turn_end) Base::prefetch_row(next + i);
      });
      v = last;
      if (v < stage || v >= vectors) continue;
      left = leave(left, v * kWidth);
      stage = next_stage(v);
    }
    for (int64_t i = 0; i < left; i += kWidth) finish_searched(i, smaller(kWidth, left - i));
    out.searched += left;
    // Where bounds tell of next to no row, the next ones are searched without a look at them.
    blind = problem.previous && (blind ? ++unlooked % kLookAgain != 0 : left > kBlind * rows_seen);
    rows_seen = 0;
    return true;
  }

  // After how many vectors of columns rows may leave again: all centroids that moved are one such place.
  WSCL_INLINE int64_t next_stage(int64_t seen) const {
    const int64_t moved = round_up(round_up(movement.count, kWidth) / kWidth, kVectors);
    return seen < moved && moved < kGrowth * seen ? moved : kGrowth * seen;
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
      T score[kWidth] = {}, met[kWidth];
      const int64_t n = smaller(kWidth, before - first);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t own = problem.assignment[row[slot[first + i]]];
        // Where the own centroid was met, it is the best, or the second is no farther than it.
        score[i] = movement.place[own] < seen ? second[i] : best[i];
      }
      Vector<T> norms, margins;
      load_slots(first, n, &norms, &margins);
      store(met, bounds_of(norms, margins, load(score)));
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = slot[first + i], r = row[at], own = problem.assignment[r];
        const T last = last_bound(r, own, seen), rest = last < met[i] ? last : met[i];
        // Where the own centroid stands still and so do all that were not met, these are no nearer than before.
        const bool rest_stands =
            movement.place[own] >= movement.count && seen >= movement.count && problem.distance[r] >= 0;
        if (upper[at] < (rest_stands ? met[i] : rest)) {
          problem.lower[r] = rest;
          keep(r, own, distance[at]);
        } else {
          if (left != first + i)
            std::memcpy(block + left * stride, block + (first + i) * stride, table.depth * sizeof(Element));
          slot[left] = at;
          states[left++] = states[first + i];
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
    const bool unknown = !problem.previous || blind;  // the distances from the own centroids
    T best[kWidth], second[kWidth], least[kWidth], beyond_best[kWidth], beyond_least[kWidth];
    best_two(first, best, second);
    Vector<T> norms, margins, squares[kWidth];
    load_slots(first, n, &norms, &margins);
    store(least, larger_of<T>(load(best) - margins, broadcast(-Base::kInfinity)));  // of ∞ − ∞ too
    store(beyond_best, bounds_of(norms, margins, load(second)));
    store(beyond_least, bounds_of(norms, margins, load(least)));
    for (int64_t i = 0; i < kWidth; ++i) squares[i] = Vector<T>{};
    int64_t nearest[kWidth];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = slot[first + i], r = row[at];
      const RowState<T>& state = states[first + i];
      nearest[i] = decider.decided(state, least[i]);
      problem.lower[r] = beyond_best[i];
      if (nearest[i] < 0) {
        double next;
        nearest[i] = decider.closer_look(point(r), length[at], state, least[i], &next);
        const double other = std::sqrt(table.cosine ? 2 * next : next);
        const T near = static_cast<T>(other < 1e38 ? other : 1e38) * (1 - 8 * eps) - slack;
        // Those below `least` were not looked at.
        problem.lower[r] = near < beyond_least[i] ? near : beyond_least[i];
      }
      if (kSquares && !table.cosine && (unknown || nearest[i] != problem.assignment[r]))
        squares[i] = squares_of(point(r), table.centroids + nearest[i] * table.d, table.d);
    }
    const Vector<T> squared = sums_of<T>(squares);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = slot[first + i], r = row[at], own = problem.assignment[r];
      const bool known = !unknown && nearest[i] == own;
      double apart = known ? distance[at] : double(squared[i]);
      if (!known && (!kSquares || table.cosine || !in_range_of_squares<T>(squared[i])))
        apart = exact_distance(table, point(r), length[at], nearest[i]);
      if (nearest[i] != own) {
        problem.assignment[r] = nearest[i];
        if (own < 0 && out.sums)
          join(r, nearest[i], length[at]);
        else
          out.moved[out.n_moved++] = {r, own};
        ++out.changed;
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
  KMeansPart part = {0, problem.x.count, nullptr, nullptr, nullptr, 0, -1};
  BoundedRows<Op>(problem, table, movement, part, out).run();
}

}  // namespace WSCL_ISA
}  // namespace wscl
