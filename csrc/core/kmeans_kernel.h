// The pass of kmeans.h for one instruction set (included by kmeans_<isa>.cpp).
//
// In PyTorch:   distance, assignment = torch.cdist(x, centroids).square().min(1)
//               sums.index_add_(0, assignment, x)
//
// Tile map. A thread owns a range of rows and takes them a block at a time:
//
//   write the block, moved and scaled, as [rows][depth]         L2; rows are broadcast operands where they lie
//   for each panel of centroids [depth][2 · kWidth]:            L1, from the L2 or L3 that all threads share
//     for each kRows rows: score_tile                           24 sums in registers, best two of each lane in
//     L1
//   for each row of the block:                                  still in L2
//     decide, take the distance from the difference, add the row to its cluster's sum
//
// Memory traffic: x once, the centroids once a block, from cache where they fit; no score is ever stored. The
// cost beside the product is the tile's epilogue (5 operations a vector against d multiply-adds), about d /
// kWidth · 3 operations a row for moving it, as many for its distance, and twice as many for its sum in
// float64.
//
// Deciding: where only one centroid's score is within twice the error bound of the best, that is the nearest.
// Else those that are have their distances taken in float64; a lane whose second best is among them is gone
// through as a whole, since it keeps only one column's number.
#pragma once

#include <cmath>
#include <cstdlib>

#include "kmeans_rows.h"
#include "kmeans_tile.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kPointBlockBytes = 128 * 1024;
constexpr int64_t kMostBlockRows = 480;

template <class Op>
struct KMeansPass {
  using T = typename Op::Number;
  using Element = typename Op::Element;
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();

  const KMeansProblem<T>& problem;
  const CentroidTable<T>& table;
  KMeansPart& part;
  const int64_t stride;  // of the block's rows, an odd number of cache lines: neighbours never share a set
  const int64_t block_rows;
  Memory memory;
  Element* block;         // [block_rows][stride]
  RowState<T>* states;    // [block_rows]
  T* margin;              // [block_rows] twice the bound of a row's scores' error
  double* length;         // [block_rows] of the points, for the cosine
  T* scratch;             // [d] a row that had to be converted
  const int64_t vectors;  // of columns

  KMeansPass(const KMeansProblem<T>& problem, const CentroidTable<T>& table, KMeansPart& part)
      : problem(problem),
        table(table),
        part(part),
        stride((round_up(table.depth * sizeof(Element), 64) / 64 | 1) * 64 / sizeof(Element)),
        block_rows(larger(
            kRows,
            smaller(kMostBlockRows, kPointBlockBytes / (stride * int64_t(sizeof(Element)))) / kRows * kRows)),
        vectors(round_up(table.k, kWidth) / kWidth) {
    memory.reserve(&block, block_rows * stride + kWidth);
    memory.reserve(&states, block_rows);
    memory.reserve(&margin, block_rows);
    memory.reserve(&length, block_rows);
    memory.reserve(&scratch, table.d + kWidth);
    memory.allocate();
  }

  void run() {
    for (int64_t row = part.row0; row < part.row1; row += block_rows) {
      const int64_t count = smaller(block_rows, part.row1 - row);
      if (!write_block(row, count)) return;
      score(count);
      finish(row, count);
    }
  }

  // False where a row is not finite.
  bool write_block(int64_t row0, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const T* x = fetch(problem.x, row0 + i, table.d, scratch);
      length[i] = table.cosine ? length_of(x, table.d) : 1;
      double norm, loss;
      write_row(x, to_unit(length[i]), block + i * stride, &norm, &loss);
      if (!(norm < 1e30)) {
        for (int64_t c = 0; c < table.d; ++c)
          if (!(std::fabs(x[c]) < kInfinity)) {
            part.bad_row = row0 + i;
            return false;
          }
        margin[i] = kInfinity;  // too far out for the product: every centroid is looked at
      } else {
        // Norms were summed up in T: a little more than their own rounding.
        const double bound = table.per_norm * norm + table.per_loss * loss + table.constant;
        margin[i] = static_cast<T>(2.001 * bound);
      }
    }
    return true;
  }

  // (x · factor − origin) · scale as the product's operand, its norm, and that of what rounding lost.
  void write_row(const T* x, double factor, Element* out, double* norm, double* loss) {
    Vector<T> norms = {}, losses = {};
    const Vector<T> scale = broadcast(table.scale);
    for (int64_t c = 0; c < table.d; c += kWidth) {
      const int64_t count = smaller(kWidth, table.d - c);
      Vector<T> point = load_part(x + c, count);
      if (table.cosine)
        for (int e = 0; e < kWidth; ++e) point[e] = static_cast<T>(point[e] * factor);
      const Vector<T> moved = (point - load_part(table.origin + c, count)) * scale;
      norms += moved * moved;
      const Vector<T> lost = moved - Op::write(out + c, moved);
      losses += lost * lost;
    }
    *norm = std::sqrt(static_cast<double>(horizontal_sum<T>(norms)));
    *loss = std::sqrt(static_cast<double>(horizontal_sum<T>(losses)));
  }

  void score(int64_t count) {
    for (int64_t i = 0; i < round_up(count, kRows); ++i)
      states[i] = {broadcast(-kInfinity), broadcast(-kInfinity), typename Simd<T>::Bits{}};
    const Element* panel = static_cast<const Element*>(table.panels);
    for (int64_t v = 0; v < vectors; v += kVectors) {
      const bool whole = v + kVectors <= vectors;
      for (int64_t i = 0; i < count; i += kRows) {
        const Element* rows[kRows];
        for (int64_t r = 0; r < kRows; ++r) rows[r] = block + smaller(i + r, count - 1) * stride;
        if (whole)
          score_tile<Op, kVectors>(rows, panel, table.depth, table.offset + v * kWidth, v, states + i);
        else
          score_tile<Op, 1>(rows, panel, table.depth, table.offset + v * kWidth, v, states + i);
      }
      panel += kVectors * kWidth * table.depth;
    }
  }

  void finish(int64_t row0, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row0 + i;
      const T* x = fetch(problem.x, row, table.d, scratch);
      int64_t nearest = decided(states[i], margin[i]);
      double distance;
      if (nearest < 0)
        nearest = decide(x, length[i], states[i], margin[i], &distance);
      else
        distance = quick_distance(x, length[i], nearest);
      problem.assignment[row] = nearest;
      constexpr double kLargest = sizeof(T) == 4 ? __FLT_MAX__ : __DBL_MAX__;
      problem.distance[row] = static_cast<T>(distance < kLargest ? distance : kLargest);
      const double weight = problem.weights ? problem.weights[row] : 1;
      part.inertia += weight * distance;
      if (part.sums) add_row(problem, x, nearest, weight, weight * to_unit(length[i]), part);
    }
  }

  // The nearest centroid, or −1 where it takes a closer look.
  int64_t decided(const RowState<T>& state, T row_margin) const {
    const Vector<T> least = broadcast(horizontal_max<T>(state.best) - row_margin);
    const uint32_t lanes = at_least<T>(state.best, least);
    if (lanes & (lanes - 1) || at_least<T>(state.second, least)) return -1;
    return column_of(state, __builtin_ctz(lanes));
  }

  static int64_t column_of(const RowState<T>& state, int lane) {
    return static_cast<int64_t>(state.vector[lane]) * kWidth + lane;
  }

  int64_t decide(const T* x, double length, const RowState<T>& state, T row_margin, double* distance) const {
    const Vector<T> least = broadcast(horizontal_max<T>(state.best) - row_margin);
    const uint32_t one = at_least<T>(state.best, least), many = at_least<T>(state.second, least);
    int64_t nearest = -1;
    *distance = 0;
    const auto consider = [&](int64_t j) {
      const double candidate = exact_distance(table, x, length, j);
      if (nearest >= 0 && !(candidate < *distance || (candidate == *distance && j < nearest))) return;
      nearest = j;
      *distance = candidate;
    };
    for (int lane = 0; lane < kWidth; ++lane) {
      if (many >> lane & 1)
        for (int64_t j = lane; j < table.k; j += kWidth) consider(j);
      else if (one >> lane & 1)
        consider(column_of(state, lane));
    }
    return nearest;
  }

  // ‖x − c‖² in T where its range allows: no digits cancel there.
  double quick_distance(const T* x, double length, int64_t j) const {
    if (sizeof(T) == 8 || table.cosine) return exact_distance(table, x, length, j);
    const T* centroid = table.centroids + j * table.d;
    Vector<T> sum = {}, other = {};
    int64_t c = 0;
    for (; c + 2 * kWidth <= table.d; c += 2 * kWidth) {
      const Vector<T> first = load(x + c) - load(centroid + c);
      const Vector<T> next = load(x + c + kWidth) - load(centroid + c + kWidth);
      sum += first * first;
      other += next * next;
    }
    for (; c < table.d; c += kWidth) {
      const int64_t count = smaller(kWidth, table.d - c);
      const Vector<T> rest = load_part(x + c, count) - load_part(centroid + c, count);
      sum += rest * rest;
    }
    const T squared = horizontal_sum<T>(sum + other);
    if (squared > T(1e-25) && squared < T(1e37)) return squared;
    return exact_distance(table, x, length, j);
  }
};

template <class Op>
void kmeans_run(const KMeansProblem<typename Op::Number>& problem,
                const CentroidTable<typename Op::Number>& table, KMeansPart& part) {
  KMeansPass<Op>(problem, table, part).run();
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
    add_row(problem, x, cluster, weight, problem.cosine ? weight * to_unit(length_of(x, problem.d)) : weight,
            part);
  }
}

// Rows [first, first + count) of q, [count][d] in T, as the panel that score_tile wants:
// [depth][vectors][kWidth], kStep elements of a column together.
template <class Op>
void kmeans_pack(const typename Op::Number* rows, int64_t count, int64_t vectors, int64_t d, int64_t depth,
                 void* panel) {
  constexpr int kWidth = Simd<typename Op::Number>::kWidth;
  typename Op::Element* out = static_cast<typename Op::Element*>(panel);
  for (int64_t p = 0; p < depth; ++p)
    for (int64_t j = 0; j < vectors * kWidth; ++j)
      out[(p / Op::kStep * vectors * kWidth + j) * Op::kStep + p % Op::kStep] =
          p < d && j < count ? Op::round(rows[j * d + p]) : typename Op::Element(0);
}

template <class Op>
constexpr KMeansTyped<typename Op::Number> kmeans_typed() {
  return {kmeans_pack<Op>,
          kmeans_run<Op>,
          kmeans_sum<typename Op::Number>,
          kVectors,
          Simd<typename Op::Number>::kWidth,
          Op::kStep,
          sizeof(typename Op::Element)};
}

}  // namespace WSCL_ISA
}  // namespace wscl
