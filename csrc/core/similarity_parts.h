// The parts that a pass is cut into, and the merging of what those of the same rows found.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu.h"
#include "reserve.h"
#include "similarity.h"

namespace wscl {

constexpr int64_t kMostLanes = 16;  // of a vector
constexpr int64_t kMergeGrain = 64;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t whole_vectors(int64_t rows) {
  return ceil_div(rows, kMostLanes) * kMostLanes;
}

template <class In>
const TypedKernels<In>& kernels();
template <>
inline const TypedKernels<float>& kernels<float>() {
  return cpu_kernels().of_float;
}
template <>
inline const TypedKernels<double>& kernels<double>() {
  return cpu_kernels().of_double;
}
template <>
inline const TypedKernels<BFloat16>& kernels<BFloat16>() {
  return cpu_kernels().of_bfloat16;
}
template <>
inline const TypedKernels<Float16>& kernels<Float16>() {
  return cpu_kernels().of_float16;
}

// A chunk of rows against several ranges of columns: the parts' outputs and statistics become the pass's.
template <class In>
void merge(const SimilarityParams<In>& p, const SimilarityPart<Compute<In>>* part, int64_t splits,
           int64_t begin, int64_t end) {
  using T = Compute<In>;
  const bool softmax = p.epilogue == Epilogue::kSoftmax || p.epilogue == Epilogue::kTwoWay;
  const bool softplus = p.epilogue == Epilogue::kSoftplus;
  std::vector<double> factor(splits, 1);
  std::vector<double> sum(p.d);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = part->row0 + i;
    double total = 1;
    if (softmax) {
      double top = -kInfinity;
      for (int64_t s = 0; s < splits; ++s)
        if (!(part[s].row_max[i] <= top)) top = part[s].row_max[i];
      total = 0;
      for (int64_t s = 0; s < splits; ++s) {
        factor[s] = part[s].row_sum[i] == 0 ? 0 : std::exp2(part[s].row_max[i] - top);
        total += factor[s] * part[s].row_sum[i];
      }
      p.row_max[row] = top;
      p.row_sum[row] = total;
    } else if (softplus) {
      p.row_max[row] = p.row_sum[row] = 0;
      for (int64_t s = 0; s < splits; ++s)
        p.row_max[row] += part[s].row_max[i], p.row_sum[row] += part[s].row_sum[i];
    }
    if (!p.gathers()) continue;
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t s = 0; s < splits; ++s)
      for (int64_t c = 0; c < p.d; ++c) sum[c] += factor[s] * part[s].output[i * part[s].output_stride + c];
    const int64_t origin = p.x.origin(row);
    const double scale = total == 0 ? 0 : p.alpha / total;
    const T* offset = p.offset && p.offset_row[origin] >= 0 ? p.offset + p.offset_row[origin] * p.d : nullptr;
    const auto write = [&](auto* to) {
      for (int64_t c = 0; c < p.d; ++c)
        from_compute(static_cast<T>(scale * sum[c] + (offset ? offset[c] : T(0)) +
                                    (p.accumulate ? to_compute(to[c]) : T(0))),
                     to + c);
    };
    if (p.output)
      write(p.output + origin * p.output_stride);
    else
      write(p.narrow_output + origin * p.output_stride);
  }
}

// The parts of a pass, with room for what several parts of the same rows find.
template <class In>
class Parts {
 public:
  using T = Compute<In>;
  explicit Parts(const SimilarityParams<In>& params) : p(params) {}

  // Rows [row0, row1) against columns cut[0] … cut[1] … cut[splits].
  void add(int64_t row0, int64_t row1, const std::vector<int64_t>& cut) {
    for (size_t s = 0; s + 1 < cut.size(); ++s)
      parts.push_back({row0, row1, cut[s], cut[s + 1], p.row_max ? p.row_max + row0 : nullptr,
                       p.row_sum ? p.row_sum + row0 : nullptr, nullptr, 0});
  }

  // `chunks` of the rows share the columns' sums by segment among them, and each of them its share among its
  // parts: chunks that different threads begin with. `sums` has room for all of these parts.
  void sum_along(int64_t chunks, int64_t splits, double* sums) {
    const int64_t all = static_cast<int64_t>(parts.size()) / splits, size = p.segments * p.d;
    for (int64_t share = 0; share < chunks; ++share)
      for (int64_t s = 0; s < splits; ++s, sums += size) {
        SimilarityPart<T>& part = parts[share * all / chunks * splits + s];
        const int64_t columns = part.column1 - part.column0;
        part.segment_sums = sums;
        part.sums_begin = part.column0 + columns * share / chunks;
        part.sums_end = part.column0 + columns * (share + 1) / chunks;
      }
  }

  // A room for each part's weights in `memory`, which has `kept_size` numbers for each.
  void keep(T* memory) {
    for (SimilarityPart<T>& part : parts) {
      const int64_t rows = whole_vectors(part.row1 - part.row0);
      part.kept.weights = memory;
      part.kept.shifts = memory + rows * (part.column1 - part.column0 + kBlock);
      memory += kept_size(rows, part.column1 - part.column0);
    }
  }

  // Room for the logits of those parts that it lasts for; returns what is left of it.
  T* keep_logits(T* room, const T* end) {
    for (SimilarityPart<T>& part : parts) {
      const int64_t rows = whole_vectors(part.row1 - part.row0);
      const int64_t size = rows * (part.column1 - part.column0 + kBlock);
      if (size > end - room) continue;
      part.logits = room;
      room += size;
    }
    return room;
  }

  static int64_t kept_size(int64_t rows, int64_t columns) {
    return rows * (columns + kBlock + columns / kLeastBlock + 1);
  }

  void run(int64_t splits, const Threads& threads) {
    run_all(splits, threads);
    parts.clear();
  }

  // The same, and what the columns gather of the weights that were kept.
  void run_both(const SimilarityParams<In>& columns, int64_t splits, const Threads& threads) {
    run_all(splits, threads);
    threads.each(static_cast<int64_t>(parts.size()),
                 [&](int64_t i) { kernels<In>().run_part(columns, parts[i]); });
    parts.clear();
  }

 private:
  void run_all(int64_t splits, const Threads& threads) {
    if (splits > 1) make_room();
    threads.each(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      if (parts[i].segment_sums) std::fill_n(parts[i].segment_sums, p.segments * p.d, 0.0);
      kernels<In>().run_part(p, parts[i]);
    });
    if (splits > 1)
      for (size_t first = 0; first < parts.size(); first += splits)
        threads.ranges(parts[first].row1 - parts[first].row0, kMergeGrain,
                       [&](int64_t begin, int64_t end) { merge(p, &parts[first], splits, begin, end); });
  }

  void make_room() {
    int64_t rows = 0;
    for (const SimilarityPart<T>& part : parts) rows += part.row1 - part.row0;
    stats.resize(2 * rows);
    if (p.gathers()) outputs.emplace(rows * p.d);
    int64_t at = 0;
    for (SimilarityPart<T>& part : parts) {
      part.row_max = &stats[2 * at];
      part.row_sum = part.row_max + (part.row1 - part.row0);
      if (p.gathers()) part.output = outputs->data() + at * p.d;
      part.output_stride = p.d;
      at += part.row1 - part.row0;
    }
  }

  const SimilarityParams<In>& p;
  std::vector<SimilarityPart<T>> parts;
  std::vector<double> stats;
  std::optional<Reserved<T>> outputs;  // written by the parts before they are read
};

}  // namespace wscl
