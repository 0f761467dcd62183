// The pass of kmeans.h for one instruction set (included by kmeans_typed.h).
//
// In PyTorch:   distance, assignment = torch.cdist(x, centroids).square().min(1)
//               sums.index_add_(0, assignment, x)
//
// Tile map. A thread owns a range of rows and takes them a block at a time:
//
//   write the block, moved and scaled, as [rows][depth]         L2; rows are broadcast operands where they lie
//   for each panel of centroids [depth][2 · kWidth]:            L1, from the L2 or L3 that all threads share
//     for each kRows rows: score_tile                           24 sums in registers, best two of each lane in
//                                                               L1, their columns in the scores' low bits
//   for each row of the block:                                  still in L2
//     decide, take the distance from the difference, add the row to its cluster's sum
//
// Memory traffic: x once, the centroids once a block, from cache where they fit; no score is ever stored. The
// cost beside the product is the tile's epilogue (4 operations a vector against d multiply-adds), about d /
// kWidth · 3 operations a row for moving it, as many for its distance, and twice as many for its sum in
// float64. Deciding: kmeans_decide.h.
#pragma once

#include <cmath>
#include <cstdlib>

#include "kmeans_decide.h"
#include "kmeans_rows.h"
#include "kmeans_tile.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kMostBlockRows = 480;

constexpr int64_t common_multiple(int64_t a, int64_t b) {
  int64_t multiple = a;
  while (multiple % b != 0) multiple += a;
  return multiple;
}

template <class Op>
struct KMeansPass {
  using T = typename Op::Number;
  using Element = typename Op::Element;
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();
  static constexpr bool kSquares = Decider<T>::kSquares;
  static constexpr int64_t kGroup = common_multiple(kRows, kWidth);  // a block is a number of these

  const KMeansProblem<T>& problem;
  const CentroidTable<T>& table;
  const Decider<T> decider;
  KMeansPart& part;
  const T* const direct;  // where the rows lie, if they need no conversion
  const int64_t stride;   // of the block's rows, an odd number of cache lines: neighbours never share a set
  const int64_t vectors;  // of columns
  const int64_t block_rows;
  Memory memory;        // allocated by run(), so that a pass derived from this one may reserve more
  Element* block;       // [block_rows][stride]
  const Element* rows;  // the operand of the block at hand: `block`, or where x lies (kmeans_in_place.h)
  int64_t rows_stride;
  RowState<T>* states;   // [block_rows]
  RowState<T>* further;  // [block_rows] of the columns at hand, where they are not the first
  T* norm;               // [block_rows] ‖p‖², as the product sees the row
  T* margin;             // [block_rows] twice the bound of a row's scores' error
  double* length;        // [block_rows] of the points, for the cosine
  T* scratch;            // [d] a row that had to be converted

  KMeansPass(const KMeansProblem<T>& problem, const CentroidTable<T>& table, KMeansPart& part)
      : problem(problem),
        table(table),
        decider{table},
        part(part),
        direct(rows_of<T>(problem.x)),
        stride((round_up(table.depth * sizeof(Element), 64) / 64 | 1) * 64 / sizeof(Element)),
        vectors(round_up(table.k, kWidth) / kWidth),
        block_rows(larger(1, smaller(kMostBlockRows, table.block_bytes / (stride * int64_t(sizeof(Element)))) /
                                 kGroup) *
                   kGroup) {
    memory.reserve(&block, block_rows * stride + kWidth);
    memory.reserve(&states, block_rows);
    memory.reserve(&further, block_rows);
    memory.reserve(&norm, block_rows);
    memory.reserve(&margin, block_rows);
    memory.reserve(&length, block_rows);
    memory.reserve(&scratch, table.d + kWidth);
  }

  void allocate() {
    memory.allocate();
    rows = block;
    rows_stride = stride;
    // What no vector of a row covers of the depth.
    for (int64_t i = 0, c = round_up(table.d, kWidth); c < table.depth && i < block_rows; ++i)
      std::memset(block + i * stride + c, 0, (table.depth - c) * sizeof(Element));
  }

  void run() {
    allocate();
    for (int64_t row = part.row0; row < part.row1; row += block_rows) {
      const int64_t count = smaller(block_rows, part.row1 - row);
      if (table.k == 1 && kSquares && !table.cosine && direct) {  // no choice
        for (int64_t i = 0; i < count; i += kWidth)
          if (!finish_only(row, i, smaller(kWidth, count - i))) return;
        continue;
      }
      for (int64_t i = 0; i < count; i += kWidth)
        if (!write_rows([row](int64_t e) { return row + e; }, i, smaller(kWidth, count - i))) return;
      score(row, count);
      if (problem.top > 1)
        for (int64_t i = 0; i < count; ++i) finish_top(row + i, i);
      else
        for (int64_t i = 0; i < count; i += kWidth) finish(row, i, smaller(kWidth, count - i));
    }
  }

  WSCL_INLINE const T* point(int64_t row) const {
    return direct ? direct + row * problem.x.row_stride : fetch(problem.x, row, table.d, scratch);
  }

  // Rows first … of the block, of which number(i) is the i-th, as the product's operands, with their margins.
  // False where one is not finite.
  template <class Number>
  bool write_rows(const Number& number, int64_t first, int64_t count) {
    Vector<T> norms[kWidth], losses[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) norms[i] = losses[i] = Vector<T>{};
    for (int64_t i = 0; i < count; ++i) {
      const T* x = point(number(first + i));
      if (table.cosine) length[first + i] = length_of(x, table.d);
      write_row(x, length[first + i], block + (first + i) * stride, &norms[i], &losses[i]);
    }
    const Vector<T> squared = sums_of<T>(norms);
    store(norm + first, squared);  // of rows beyond count too: their own memory
    // Norms were summed up in T: a little more than their own rounding.
    Vector<T> bound = T(table.per_norm) * square_root<T>(squared) + T(table.constant);
    if (Op::kRounds) bound += T(table.per_loss) * square_root<T>(sums_of<T>(losses));
    store(margin + first, T(2.001) * bound);
    for (uint32_t far = kAllLanes<T> & ~at_least<T>(broadcast(T(1e30)), squared); far; far &= far - 1) {
      const int i = __builtin_ctz(far);
      if (!check_finite(number(first + i))) return false;
      margin[first + i] = kInfinity;  // too far out for the product: every centroid is looked at
    }
    return true;
  }

  // False, and the row remembered, where one of its numbers is not finite.
  bool check_finite(int64_t row) {
    const T* x = point(row);
    for (int64_t c = 0; c < table.d; ++c)
      if (!(std::fabs(x[c]) < kInfinity)) {
        part.bad_row = row;
        return false;
      }
    return true;
  }

  // (x / own_length − origin) · scale as the product's operand, its squared norm, and that of what rounding
  // lost.
  WSCL_INLINE void write_row(const T* x, double own_length, Element* out, Vector<T>* norms, Vector<T>* losses) {
    const Vector<T> scale = broadcast(table.scale);
    const double factor = table.cosine ? to_unit(own_length) : 1;
    const bool in_range = factor > 1e-30 && factor < 1e30;
    *norms = *losses = Vector<T>{};
    const int64_t whole = table.d / kWidth * kWidth;
    int64_t c = 0;
    if (!table.cosine) {
      for (; c < whole; c += kWidth) write(load(x + c), load(table.origin + c), scale, out + c, norms, losses);
    } else if (in_range) {
      const Vector<T> factors = broadcast(static_cast<T>(factor));
      for (; c < whole; c += kWidth)
        write(load(x + c) * factors, load(table.origin + c), scale, out + c, norms, losses);
    }
    for (; c < table.d; c += kWidth) {
      const int64_t count = smaller(kWidth, table.d - c);
      Vector<T> point = load_part(x + c, count);
      if (table.cosine)
        for (int64_t e = 0; e < count; ++e) point[e] = static_cast<T>(point[e] * factor);
      write(point, load_part(table.origin + c, count), scale, out + c, norms, losses);
    }
  }

  static WSCL_INLINE void write(Vector<T> point, Vector<T> origin, Vector<T> scale, Element* out,
                                Vector<T>* norms, Vector<T>* losses) {
    const Vector<T> moved = (point - origin) * scale;
    *norms += moved * moved;
    const Vector<T> kept = Op::write(out, moved);
    if (Op::kRounds) *losses += (moved - kept) * (moved - kept);
  }

  void score(int64_t row0, int64_t count) {
    for (int64_t first = 0; first < vectors; first += kGroupVectors)
      score_group(first, smaller(vectors, first + kGroupVectors), count, [&](int64_t i) {
        if (row0 + block_rows + i < part.row1) prefetch_row(row0 + block_rows + i);
      });
  }

  // Scores of vectors [first, last) of columns, at most a group of them, into the states of the block's first
  // `count` rows. With the first group ahead(i) asks for the i-th row of the next block, a few for each tile:
  // many at once would have to wait for each other.
  template <class Ahead>
  WSCL_INLINE void score_group(int64_t first, int64_t last, int64_t count, const Ahead& ahead) {
    using Bits = typename Simd<T>::Bits;
    [[maybe_unused]] const typename Op::InUse in_use;
    const Bits index_mask = Bits{} + ((decltype(Bits{}[0] + 0)(1) << table.index_bits) - 1);
    const Element* panel = static_cast<const Element*>(table.panels) + first * kWidth * table.depth;
    const int64_t whole = smaller(last, vectors - (table.terms > 1));  // vectors with one lane for each column
    const int64_t panels = (whole - first + kVectors - 1) / kVectors + (last - whole);
    RowState<T>* const group = first == 0 ? states : further;
    for (int64_t i = 0; i < round_up(count, kRows); ++i)
      group[i].best = group[i].second = broadcast(-kInfinity);
    for (int64_t v = first, at = 0, wide; v < last; v += wide, ++at) {
      wide = v + kVectors <= whole ? kVectors : 1;
      for (int64_t i = 0; i < count; i += kRows) {
        for (int64_t r = kRows * at / panels; first == 0 && r < kRows * (at + 1) / panels; ++r) ahead(i + r);
        const Tile<Op> tile = {rows + i * rows_stride,    rows_stride, count - i,  panel,    table.depth,
                               table.offset + v * kWidth, v - first,   index_mask, group + i};
        if (wide == kVectors)
          score_tile<kVectors>(Op(), tile);
        else if (v < whole)
          score_tile<1>(Op(), tile);
        else if constexpr (Op::kMostTerms > 1)
          table.terms == 2 ? score_narrow_tile<2>(Op(), tile) : score_narrow_tile<4>(Op(), tile);
      }
      panel += wide * kWidth * table.depth;
    }
    merge_group(first, index_mask, count);
  }

  // A group of vectors from `first` on is part of the rows' states.
  WSCL_INLINE void merge_group(int64_t first, typename Simd<T>::Bits index_mask, int64_t count) {
    using Bits = typename Simd<T>::Bits;
    for (int64_t i = 0; first == 0 && i < count; ++i) states[i].vector = (Bits)states[i].best & index_mask;
    for (int64_t i = 0; first > 0 && i < count; ++i) {
      const Vector<T> best = further[i].best, second = further[i].second;
      const Bits where = ((Bits)best & index_mask) + static_cast<decltype(index_mask[0] + 0)>(first);
      RowState<T>& state = states[i];
      const Vector<T> lower = minimum<T>(best, state.best);
      state.second = larger_of<T>(larger_of<T>(state.second, second), lower);
      state.vector = best > state.best ? where : state.vector;
      state.best = larger_of<T>(best, state.best);
    }
  }

  WSCL_INLINE void prefetch_row(int64_t row) const {
    const char* line = reinterpret_cast<const char*>(direct + row * problem.x.row_stride);
    for (int64_t b = 0; direct && b < table.d * int64_t(sizeof(T)); b += 64) __builtin_prefetch(line + b, 0, 2);
    asm volatile("");  // compilers take a function that only prefetches for one that does nothing
  }

  // The same where there is one centroid; false where a row is not finite.
  bool finish_only(int64_t row0, int64_t first, int64_t count) {
    const int64_t row = row0 + first;
    Vector<T> squares[kWidth];
    int64_t nearest[kWidth] = {};
    for (int64_t i = 0; i < kWidth; ++i) squares[i] = Vector<T>{};
    for (int64_t i = 0; i < count; ++i) {
      if (row + i + 2 * kWidth < part.row1) prefetch_row(row + i + 2 * kWidth);
      problem.assignment[row + i] = 0;
      squares[i] = squares_of(point(row + i), table.centroids, table.d);
    }
    const Vector<T> squared = sums_of<T>(squares);
    for (int64_t i = 0; i < count; ++i)
      if (!(squared[i] < kInfinity) && !check_finite(row + i)) return false;
    add_up(row, first, count, nearest, squared);
    return true;
  }

  // Decides rows row0 + first …, and adds them up.
  void finish(int64_t row0, int64_t first, int64_t count) {
    const RowState<T>* state = states + first;
    const int64_t row = row0 + first;
    T least[kWidth];
    Vector<T> top[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) top[i] = state[i].best;  // of rows beyond count too: their own memory
    const Vector<T> lowest = broadcast(-kInfinity);
    store(least, larger_of<T>(largest_of<T>(top) - load(margin + first), lowest));  // of ∞ − ∞ too

    Vector<T> squares[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) squares[i] = Vector<T>{};
    int64_t nearest[kWidth];
    double second;
    for (int64_t i = 0; i < count; ++i) {
      nearest[i] = decider.decided(state[i], least[i]);
      if (nearest[i] < 0)
        nearest[i] = decider.closer_look(point(row + i), length[first + i], state[i], least[i], &second);
      problem.assignment[row + i] = nearest[i];
      if (kSquares && !table.cosine) __builtin_prefetch(table.centroids + nearest[i] * table.d);
    }
    for (int64_t i = 0; kSquares && !table.cosine && i < count; ++i)
      squares[i] = squares_of(point(row + i), table.centroids + nearest[i] * table.d, table.d);
    add_up(row, first, count, nearest, sums_of<T>(squares));
  }

  // Rows row …, the block's first …, into the sums of their nearest centroids, at these squared distances.
  WSCL_INLINE void add_up(int64_t row, int64_t first, int64_t count, const int64_t* nearest,
                          Vector<T> squared) {
    for (int64_t i = 0; part.sums && i < count; ++i) {
      const double weight = problem.weights ? problem.weights[row + i] : 1;
      add_row(problem, point(row + i), nearest[i], weight, length[first + i], part);
    }
    // ‖x − c‖² in T where its range allows: no digits cancel there.
    if (kSquares && count == kWidth && !problem.weights && all_in_range_of_squares<T>(squared)) {
      store(problem.distance + row, squared);
      Vector<double> sum = {};
      for (int i = 0; i < kWidth; i += Simd<double>::kWidth) sum += widen(problem.distance + row + i);
      part.inertia += horizontal_sum<double>(sum);
      return;
    }
    double inertia = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool exact = !kSquares || !in_range_of_squares<T>(squared[i]);
      const double distance =
          exact ? exact_distance(table, point(row + i), length[first + i], nearest[i]) : double(squared[i]);
      problem.distance[row + i] = saturate<T>(distance);
      inertia += (problem.weights ? problem.weights[row + i] : 1) * distance;
    }
    part.inertia += inertia;
  }

  // The nearest few of row `row`, the block's i-th, in order.
  void finish_top(int64_t row, int64_t i) {
    const RowState<T>& state = states[i];
    // The lowest of the `top` best scores among those that the lanes kept: no higher than the true one.
    T kept[kMostTop];
    for (int64_t e = 0; e < problem.top; ++e) kept[e] = -kInfinity;
    for (int lane = 0; lane < 2 * kWidth; ++lane) {
      T score = lane < kWidth ? state.best[lane] : state.second[lane - kWidth];
      for (int64_t e = 0; e < problem.top && score > -kInfinity; ++e)
        if (score > kept[e]) {
          const T lower = kept[e];
          kept[e] = score;
          score = lower;
        }
    }
    double distance[kMostTop];
    T least = kept[problem.top - 1] - margin[i];
    if (!(least > -kInfinity)) least = -kInfinity;  // ∞ − ∞ too
    decider.decide(point(row), length[i], state, least, problem.top, problem.assignment + row * problem.top,
                   distance);
    for (int64_t e = 0; e < problem.top; ++e)
      problem.distance[row * problem.top + e] = saturate<T>(distance[e]);
  }
};

}  // namespace WSCL_ISA
}  // namespace wscl
