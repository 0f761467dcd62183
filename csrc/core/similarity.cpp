// Cutting a pass into parts for the threads, and merging what they found.

#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reserve.h"
#include "similarity_parts.h"

namespace wscl {
namespace {

constexpr int64_t kKeptBytes = 28 << 20;  // of weights that are kept at a time
constexpr int64_t kPanelRows = 48;        // at most
constexpr int64_t kLeastRows = 96;        // fewer rows do not pay for reading a block of columns
constexpr int64_t kLeastColumns = 1024;   // fewer columns do not pay for a merge
constexpr int64_t kLeastOwnColumns = 64;  // nor for a thread where columns get results
constexpr int64_t kManyColumns = 16;      // for a row: to pack it in every thread costs less than to read them
constexpr int64_t kChunkBytes = 1 << 19;  // a chunk's rows, packed: they and their output stay in L2
constexpr int64_t kSumBytes = 8 << 20;    // a thread's accumulators in segment_sums
constexpr int64_t kLeastSumColumns = 16;  // a cache line of floats
constexpr int64_t kRowsOfSum = 4;         // fewer for a segment and thread do not pay for a merge
constexpr int64_t kMostSums = 1 << 19;    // accumulators of all threads together, where each has rows
constexpr int64_t kSumGrain = 4096;

// Into how many slices, each with sums of its own, segment_sums may cut `count` rows; below 1 where there is
// not even room for all sums at once.
int64_t most_slices(int64_t count, int64_t segments, int64_t d) {
  return std::min(count / (kRowsOfSum * segments), kMostSums / (segments * d));
}

// The sums [slices][size], added up.
template <class T>
void add_slices(const double* slices, int64_t count, int64_t size, T* sums, const Threads& threads) {
  threads.ranges(size, kSumGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      double sum = slices[at];
      for (int64_t s = 1; s < count; ++s) sum += slices[s * size + at];
      sums[at] = static_cast<T>(sum);
    }
  });
}

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

// Which parts there are, and how logits lie in them, hangs on these two.
template <class T>
T signature(const Threads& threads) {
  return static_cast<T>(threads.count * kInstructionSets + instruction_set_number());
}

// Columns get results: every thread has columns of its own, and the chunks of rows follow one another.
template <class In>
void run_to_columns(const SimilarityParams<In>& p, int64_t most_rows, const Threads& threads) {
  using T = Compute<In>;
  T *room = nullptr, *const end = p.logits.data + p.logits.size;
  if (p.logits.size > kMostLanes) {
    const T now = signature<T>(threads);
    if (!p.logits_known) *p.logits.data = now;
    if (*p.logits.data == now) room = p.logits.data + kMostLanes;
  }
  const int64_t chunks = ceil_div(p.x.count, most_rows);
  const int64_t rows = whole_vectors(ceil_div(p.x.count, chunks));
  Parts<In> parts(p);
  for (int64_t row0 = 0; row0 < p.x.count; row0 += rows) {
    const int64_t row1 = std::min(p.x.count, row0 + rows);
    const std::vector<int64_t> cut = fair_cuts(p, row0, row1, threads.count);
    parts.add(row0, row1, cut);
    if (room) room = parts.keep_logits(room, end);
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
    // In memory that stays, at most kMostSums: fresh pages would cost more than the sums.
    const Reserved<double> sums(summing * splits * size);
    parts.sum_along(summing, splits, sums.data());
    run();
    add_slices(sums.data(), summing * splits, size, p.segment_sums, threads);
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
  const int64_t rows = whole_vectors(ceil_div(n, chunks));
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
  const int64_t rows =
      std::min(ceil_div(ceil_div(n, ceil_div(n, most)), kPanelRows) * kPanelRows, whole_vectors(n));
  const int64_t splits = std::clamp<int64_t>(m / kLeastOwnColumns, 1, threads.count);
  const std::vector<int64_t> cut = equal_cuts(0, m, splits);
  Parts<In> parts(p);
  const Reserved<T> kept(splits * Parts<In>::kept_size(rows, ceil_div(m, splits)));
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
    const Reserved<double> parts(slices * size);
    threads.each(slices, [&](int64_t s) {
      double* const part = parts.data() + s * size;
      std::fill_n(part, size, 0.0);
      kernels<In>().sum_columns(rows, rows.count * s / slices, rows.count * (s + 1) / slices, 0, d, segment,
                                weight, part);
    });
    return add_slices(parts.data(), slices, size, sums, threads);
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
