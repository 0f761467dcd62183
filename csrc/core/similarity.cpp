// Cutting a pass into parts for the threads, and merging what they found.

#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"
#include "pages.h"

namespace wscl {
namespace {

constexpr int64_t kKeptBytes = 28 << 20;   // of weights that are kept at a time
constexpr int64_t kPanelRows = 48;         // at most
constexpr int64_t kLeastRows = 96;         // fewer rows do not pay for reading a block of columns
constexpr int64_t kRowGrain = 16;          // a vector's lanes, at most
constexpr int64_t kLeastColumns = 1024;    // fewer columns do not pay for a merge
constexpr int64_t kLeastOwnColumns = 128;  // nor for a thread where columns get results
constexpr int64_t kMergeGrain = 64;
constexpr int64_t kManyColumns = 32;      // for a row: to pack it in every thread costs less than to read them
constexpr int64_t kChunkBytes = 1 << 19;  // a chunk's rows, packed: they and their output stay in L2
constexpr int64_t kSumBytes = 8 << 20;    // a thread's accumulators in segment_sums
constexpr int64_t kLeastSumColumns = 16;  // a cache line of floats
constexpr int64_t kRowsOfSum = 4;         // fewer for a segment and thread do not pay for a merge
constexpr int64_t kMostSums = 1 << 19;    // accumulators of all threads together, where each has rows
constexpr int64_t kSumGrain = 4096;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class In>
const TypedKernels<In>& kernels();
template <>
const TypedKernels<float>& kernels<float>() {
  return cpu_kernels().of_float;
}
template <>
const TypedKernels<double>& kernels<double>() {
  return cpu_kernels().of_double;
}
template <>
const TypedKernels<BFloat16>& kernels<BFloat16>() {
  return cpu_kernels().of_bfloat16;
}
template <>
const TypedKernels<Float16>& kernels<Float16>() {
  return cpu_kernels().of_float16;
}

// Into how many slices, each with sums of its own, segment_sums may cut `count` rows; below 1 where there is
// not even room for all sums at once.
int64_t most_slices(int64_t count, int64_t segments, int64_t d) {
  return std::min(count / (kRowsOfSum * segments), kMostSums / (segments * d));
}

// The slices' sums [slices][size], added up.
template <class T>
void add_slices(const std::vector<double>& slices, int64_t size, T* sums, const Threads& threads) {
  threads.ranges(size, kSumGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      double sum = slices[at];
      for (size_t s = at + size; s < slices.size(); s += size) sum += slices[s];
      sums[at] = static_cast<T>(sum);
    }
  });
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
      const int64_t rows = ceil_div(part.row1 - part.row0, kRowGrain) * kRowGrain;
      part.kept.weights = memory;
      part.kept.shifts = memory + rows * (part.column1 - part.column0 + kBlock);
      memory += kept_size(rows, part.column1 - part.column0);
    }
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
    if (p.gathers()) outputs.resize(rows * p.d);
    int64_t at = 0;
    for (SimilarityPart<T>& part : parts) {
      part.row_max = &stats[2 * at];
      part.row_sum = part.row_max + (part.row1 - part.row0);
      if (p.gathers()) part.output = &outputs[at * p.d];
      part.output_stride = p.d;
      at += part.row1 - part.row0;
    }
  }

  const SimilarityParams<In>& p;
  std::vector<SimilarityPart<T>> parts;
  std::vector<double> stats;
  std::vector<T> outputs;
};

std::vector<int64_t> equal_cuts(int64_t begin, int64_t end, int64_t splits) {
  std::vector<int64_t> cut;
  for (int64_t s = 0; s <= splits; ++s) cut.push_back(begin + (end - begin) * s / splits);
  return cut;
}

// Columns cut so that every thread meets about as many pairs of these rows.
template <class In>
std::vector<int64_t> fair_cuts(const SimilarityParams<In>& p, int64_t row0, int64_t row1, int threads) {
  int64_t begin = 0, end = p.y.count;
  const bool ranges = p.begin && !p.outside;
  if (ranges) begin = std::min(end, p.begin[row0]), end = std::max(begin, std::min(end, p.end[row1 - 1]));
  const int64_t splits = std::clamp<int64_t>((end - begin) / kLeastOwnColumns, 1, threads);
  if (!ranges || splits == 1) return equal_cuts(begin, end, splits);
  // As column j goes by, so many more rows begin, and so many end.
  std::vector<int64_t> change(end - begin + 1, 0);
  int64_t pairs = 0;
  for (int64_t i = row0; i < row1; ++i) {
    if (p.end[i] <= p.begin[i]) continue;
    ++change[p.begin[i] - begin];
    --change[p.end[i] - begin];
    pairs += p.end[i] - p.begin[i];
  }
  std::vector<int64_t> cut = {begin};
  int64_t met = 0, seen = 0;
  for (int64_t j = begin; j < end; ++j) {
    met += change[j - begin];
    seen += met;
    while (static_cast<int64_t>(cut.size()) < splits &&
           seen * splits >= pairs * static_cast<int64_t>(cut.size()))
      cut.push_back(j + 1);
  }
  cut.resize(splits, end);
  cut.push_back(end);
  return cut;
}

// Columns get results: every thread has columns of its own, and the chunks of rows follow one another.
template <class In>
void run_to_columns(const SimilarityParams<In>& p, int64_t most_rows, const Threads& threads) {
  const int64_t chunks = ceil_div(p.x.count, most_rows);
  const int64_t rows = ceil_div(ceil_div(p.x.count, chunks), kRowGrain) * kRowGrain;
  Parts<In> parts(p);
  for (int64_t row0 = 0; row0 < p.x.count; row0 += rows) {
    const int64_t row1 = std::min(p.x.count, row0 + rows);
    const std::vector<int64_t> cut = fair_cuts(p, row0, row1, threads.count);
    parts.add(row0, row1, cut);
    parts.run(static_cast<int64_t>(cut.size()) - 1, threads);
  }
}

// Runs the parts, by `run`, with the columns' sums by segment: `summing` chunks of the rows take them along
// where there is room for it.
template <class In, class Run>
void with_segment_sums(const SimilarityParams<In>& p, Parts<In>& parts, int64_t summing, int64_t splits,
                       const Threads& threads, const Run& run) {
  const int64_t size = p.segment_sums ? p.segments * p.d : 0;
  if (size == 0) return run();
  if (most_slices(p.y.count, p.segments, p.d) >= summing * splits) {
    // Kept by the thread, at most kMostSums: fresh pages would cost more than the sums.
    static thread_local std::vector<double> sums;
    sums.resize(summing * splits * size);
    parts.sum_along(summing, splits, sums.data());
    run();
    add_slices(sums, size, p.segment_sums, threads);
  } else {
    run();
    segment_sums<In>(p.y, p.d, p.column_segment, nullptr, p.segments, p.segment_sums, threads);
  }
}

// How many rows, packed, and their output stay in L2.
template <class In>
int64_t rows_of_chunk(int64_t d) {
  return std::max<int64_t>(kLeastRows,
                           kChunkBytes / std::max<int64_t>(1, d * static_cast<int64_t>(sizeof(Compute<In>))));
}

}  // namespace

template <class In>
void run_similarity(const SimilarityParams<In>& p, const Threads& threads) {
  const int64_t n = p.x.count, m = p.y.count;
  if (n == 0) return;
  const int64_t most_rows = rows_of_chunk<In>(p.d);
  if (p.to_columns()) return run_to_columns(p, most_rows, threads);
  // Many columns are read once, by threads that have columns of their own, where all rows fit into half a
  // chunk.
  const bool by_columns = n <= most_rows / (p.gathers() ? 4 : 2) && m >= kManyColumns * n;
  int64_t chunks = by_columns ? 1 : std::clamp<int64_t>(n / kLeastRows, 1, threads.count);
  if (ceil_div(n, chunks) > most_rows)  // a whole number of rounds, so that no thread waits for the last one
    chunks = ceil_div(ceil_div(n, most_rows), threads.count) * threads.count;
  const int64_t rows = ceil_div(ceil_div(n, chunks), kRowGrain) * kRowGrain;
  chunks = ceil_div(n, rows);
  const int64_t splits =
      std::clamp<int64_t>(m / kLeastColumns, 1, std::max<int64_t>(1, threads.count / chunks));
  Parts<In> parts(p);
  for (int64_t row0 = 0; row0 < n; row0 += rows)
    parts.add(row0, std::min(n, row0 + rows), equal_cuts(0, m, splits));
  with_segment_sums(p, parts, std::min<int64_t>(chunks, threads.count), splits, threads,
                    [&] { parts.run(splits, threads); });
}

template <class In>
void run_softmax_both(const SimilarityParams<In>& p, SimilarityParams<In> columns, const Threads& threads) {
  using T = Compute<In>;
  const int64_t n = p.x.count, m = p.y.count;
  // Whole panels: of as many rows as are packed at a time, or as have room for their weights.
  const int64_t room = kKeptBytes / ((m + kBlock) * static_cast<int64_t>(sizeof(T)));
  const int64_t most = std::max<int64_t>(1, std::min(rows_of_chunk<In>(p.d), room) / kPanelRows) * kPanelRows;
  const int64_t rows = ceil_div(ceil_div(n, ceil_div(n, most)), kPanelRows) * kPanelRows;
  const int64_t splits = std::clamp<int64_t>(m / kLeastOwnColumns, 1, threads.count);
  const std::vector<int64_t> cut = equal_cuts(0, m, splits);
  Parts<In> parts(p);
  const LargeArray<T> kept(splits * Parts<In>::kept_size(rows, ceil_div(m, splits)));
  for (int64_t row0 = 0; row0 < n; row0 += rows) {
    parts.add(row0, std::min(n, row0 + rows), cut);
    parts.keep(kept.data());
    const auto run = [&] { parts.run_both(columns, splits, threads); };
    if (row0 == 0)
      with_segment_sums(p, parts, 1, splits, threads, run);
    else
      run();
    columns.accumulate = true;
    columns.offset = nullptr;  // once
  }
}

template <class In>
void segment_sums(const Rows<In>& rows, int64_t d, const int64_t* segment, const Compute<In>* weight,
                  int64_t segments, Compute<In>* sums, const Threads& threads) {
  if (segments == 0 || d == 0) return;
  const int64_t most = kSumBytes / (segments * static_cast<int64_t>(sizeof(double)));
  const int64_t width =
      std::max(kLeastSumColumns,
               std::min(most, ceil_div(ceil_div(d, threads.count), kLeastSumColumns) * kLeastSumColumns));
  // Threads share the rows, each with sums of its own, where these are few enough for it; else the columns.
  const int64_t size = segments * d;
  const int64_t slices = std::clamp<int64_t>(most_slices(rows.count, segments, d), 1, threads.count);
  if (slices > 1 && slices >= std::min<int64_t>(threads.count, ceil_div(d, width))) {
    std::vector<double> parts(slices * size, 0.0);
    threads.each(slices, [&](int64_t s) {
      kernels<In>().sum_columns(rows, rows.count * s / slices, rows.count * (s + 1) / slices, 0, d, segment,
                                weight, &parts[s * size]);
    });
    return add_slices(parts, size, sums, threads);
  }
  threads.each(ceil_div(d, width), [&](int64_t task) {
    const int64_t c0 = task * width, c1 = std::min(d, c0 + width);
    std::vector<double> part(segments * (c1 - c0), 0.0);
    kernels<In>().sum_columns(rows, 0, rows.count, c0, c1, segment, weight, part.data());
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t c = c0; c < c1; ++c)
        sums[s * d + c] = static_cast<Compute<In>>(part[s * (c1 - c0) + c - c0]);
  });
}

template void run_softmax_both<float>(const SimilarityParams<float>&, SimilarityParams<float>, const Threads&);
template void run_softmax_both<double>(const SimilarityParams<double>&, SimilarityParams<double>,
                                       const Threads&);

#define WSCL_INSTANTIATE(In)                                                                            \
  template void run_similarity<In>(const SimilarityParams<In>&, const Threads&);                        \
  template void segment_sums<In>(const Rows<In>&, int64_t, const int64_t*, const Compute<In>*, int64_t, \
                                 Compute<In>*, const Threads&);
WSCL_INSTANTIATE(float)
WSCL_INSTANTIATE(double)
WSCL_INSTANTIATE(BFloat16)
WSCL_INSTANTIATE(Float16)
#undef WSCL_INSTANTIATE

}  // namespace wscl
