// Prepares a pass with bounds, cuts the rows among the threads, and puts their parts together in order.
#include "kmeans_bounds.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kmeans_prepared.h"

namespace wscl {
namespace {

// Own sums of the threads in a first pass may take this much together; beyond, rows that join are listed.
constexpr int64_t kJoinBytes = 4 << 20;

template <class T>
struct Moves {
  std::vector<int64_t> order, place;
  std::vector<T> length;
  int64_t count = 0;

  Moves(const BoundsProblem<T>& p, const Threads& threads) : order(p.k), place(p.k), length(p.k + 2) {
    std::iota(order.begin(), order.end(), 0);
    if (p.previous) {
      std::vector<double> moved(p.k);
      threads.ranges(p.k, 64, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) moved[j] = apart(p, j);
      });
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return moved[a] > moved[b]; });
      using Limits = std::numeric_limits<T>;
      const T up = 1 + 4 * Limits::epsilon();
      while (count < p.k && moved[order[count]] > 0) ++count;
      for (int64_t i = 0; i < count; ++i)
        length[i] =
            static_cast<T>(std::clamp(moved[order[i]] * up, double(Limits::min()), double(Limits::max())));
    }
    for (int64_t i = 0; i < p.k; ++i) place[order[i]] = i;
  }

 private:
  // ‖a‖, whatever its scale.
  static double length_of(const T* a, int64_t d) {
    double largest = 0, sum = 0;
    for (int64_t c = 0; c < d; ++c) largest = std::max<double>(largest, std::abs(a[c]));
    if (largest == 0) return 0;
    for (int64_t c = 0; c < d; ++c) sum += a[c] / largest * (a[c] / largest);
    return std::sqrt(sum) * largest;
  }

  // How far centroid j went, 0 where it is the same in every bit; for the cosine the unit vector.
  static double apart(const BoundsProblem<T>& p, int64_t j) {
    const T *a = p.centroids + j * p.d, *b = p.previous + j * p.d;
    if (std::equal(a, a + p.d, b)) return 0;
    double own = 1, other = 1;
    if (sizeof(T) == sizeof(float) && !p.cosine) {  // squares of floats fit
      double sum = 0;
      for (int64_t c = 0; c < p.d; ++c) sum += (double(a[c]) - b[c]) * (double(a[c]) - b[c]);
      return std::sqrt(sum);
    }
    if (p.cosine) {
      own = length_of(a, p.d);
      other = length_of(b, p.d);
      if (own == 0 || other == 0) return 2;  // no direction: whatever the distances were, they are others now
    }
    double largest = 0, sum = 0;
    for (int64_t c = 0; c < p.d; ++c) largest = std::max(largest, std::abs(a[c] / own - b[c] / other));
    if (largest == 0) return std::numeric_limits<T>::min();  // it is another all the same
    for (int64_t c = 0; c < p.d; ++c) {
      const double share = (a[c] / own - b[c] / other) / largest;
      sum += share * share;
    }
    return std::sqrt(sum) * largest;
  }
};

}  // namespace

template <class T>
BoundedPass kmeans_bounded_pass(const BoundsProblem<T>& p, const Threads& threads) {
  bool rounded;
  const KMeansTyped<T>& typed = choose<T>(p, &rounded);
  const Moves<T> moves(p, threads);
  const Movement<T> movement = {moves.order.data(), moves.place.data(), moves.count, moves.length.data()};
  const Prepared<T> prepared(p, typed, rounded, threads, true, moves.order.data());
  const int64_t n = p.x.count, turn = BoundedPart::kTurn;
  const int64_t n_parts = std::clamp<int64_t>(ceil_div(n, turn), 1, threads.count);

  std::vector<BoundedPart> parts(n_parts);
  std::vector<std::vector<int64_t>> counts(n_parts);
  std::vector<std::vector<double>> weight_sums(n_parts);
  std::vector<std::unique_ptr<Moved[]>> moved(n_parts);
  std::vector<std::vector<double>> sums(n_parts);  // of a first pass
  const bool own_sums = !p.previous && n_parts * p.k * p.d * int64_t(sizeof(double)) <= kJoinBytes;
  threads.each(n_parts, [&](int64_t i) {
    BoundedPart part;
    part.number = i;
    part.count = n_parts;
    moved[i].reset(
        new Moved[ceil_div(ceil_div(n, turn), n_parts) * turn]);  // pages that stay untouched cost nothing
    part.moved = moved[i].get();
    if (own_sums) {
      sums[i].resize(p.k * p.d);
      part.sums = sums[i].data();
    }
    if (p.weight_sums) {
      weight_sums[i].resize(p.k);
      part.weight_sums = weight_sums[i].data();
    } else {
      counts[i].resize(p.k);
      part.counts = counts[i].data();
    }
    typed.bounded(p, prepared.table, movement, part);
    parts[i] = part;
  });

  BoundedPass pass;
  for (const BoundedPart& part : parts)
    if (part.bad_row >= 0) {
      pass.bad_row = part.bad_row;
      return pass;
    }
  double inertia = 0;
  int64_t n_moved = 0;
  for (const BoundedPart& part : parts) {
    inertia += part.inertia;
    n_moved += part.n_moved;
    pass.changed += part.changed;
    pass.peak = std::max(pass.peak, part.peak);
    pass.searched += part.searched;
    pass.by_half += part.by_half;
  }
  *p.inertia = inertia;
  for (int64_t j = 0; j < p.k; ++j) {
    if (p.weight_sums) {
      p.weight_sums[j] = 0;
      for (const BoundedPart& part : parts) p.weight_sums[j] += part.weight_sums[j];
    } else {
      p.counts[j] = 0;
      for (const BoundedPart& part : parts) p.counts[j] += part.counts[j];
    }
  }
  if (own_sums)
    threads.ranges(p.k * p.d, 1 << 12, [&](int64_t begin, int64_t end) {
      for (const std::vector<double>& part : sums)
        for (int64_t e = begin; e < end; ++e) p.sums[e] += part[e];
    });
  // Each thread has columns of its own, of all rows that moved: no sums to put together.
  const int64_t n_ranges = std::clamp<int64_t>(p.d / 16, 1, n_moved > 64 ? threads.count : 1);
  std::vector<double> peaks(n_ranges);
  threads.each(n_ranges, [&](int64_t i) {
    const int64_t column0 = p.d * i / n_ranges, column1 = p.d * (i + 1) / n_ranges;
    for (const BoundedPart& part : parts)
      peaks[i] = std::max(peaks[i], typed.move(p, part.moved, part.n_moved, column0, column1));
  });
  for (double peak : peaks) pass.peak = std::max(pass.peak, peak);
  return pass;
}

template BoundedPass kmeans_bounded_pass<float>(const BoundsProblem<float>&, const Threads&);
template BoundedPass kmeans_bounded_pass<double>(const BoundsProblem<double>&, const Threads&);

}  // namespace wscl
