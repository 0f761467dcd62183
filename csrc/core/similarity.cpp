// Cutting a pass into parts for the threads, and merging what they found.

#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"

namespace wscl {
namespace {

constexpr int64_t kLeastRows = 96;        // fewer rows do not pay for reading a block of columns
constexpr int64_t kRowGrain = 16;         // a vector's lanes, at most
constexpr int64_t kLeastColumns = 1024;   // fewer columns do not pay for a merge
constexpr int64_t kChunkBytes = 1 << 20;  // a chunk's rows, packed
constexpr int64_t kSumBytes = 8 << 20;    // a thread's accumulators in segment_sums
constexpr int64_t kLeastSumColumns = 16;  // a cache line of floats

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

// Rows [row0, row1): the parts' outputs and softmax statistics become the pass's.
template <class In>
void merge(const SimilarityParams<In>& p, const std::vector<SimilarityPart<Compute<In>>>& parts, int64_t splits,
           int64_t chunk) {
  using T = Compute<In>;
  const SimilarityPart<T>* part = &parts[chunk * splits];
  const bool softmax = p.epilogue == Epilogue::kSoftmax;
  std::vector<double> factor(splits, 1);
  std::vector<double> sum(p.d);
  for (int64_t i = 0; i < part->row1 - part->row0; ++i) {
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

}  // namespace

template <class In>
void run_similarity(const SimilarityParams<In>& p, const Threads& threads) {
  using T = Compute<In>;
  const int64_t n = p.x.count, m = p.y.count, tile = kRowGrain;
  if (n == 0) return;
  const int64_t most_rows =
      std::max<int64_t>(kLeastRows, kChunkBytes / std::max<int64_t>(1, p.d * static_cast<int64_t>(sizeof(T))));
  int64_t chunks = std::clamp<int64_t>(n / kLeastRows, 1, threads.count);
  if (ceil_div(n, chunks) > most_rows)  // a whole number of rounds, so that no thread waits for the last one
    chunks = ceil_div(ceil_div(n, most_rows), threads.count) * threads.count;
  const int64_t rows = ceil_div(ceil_div(n, chunks), tile) * tile;
  chunks = ceil_div(n, rows);
  const int64_t splits =
      std::clamp<int64_t>(m / kLeastColumns, 1, std::max<int64_t>(1, threads.count / chunks));

  std::vector<double> part_stats;
  std::vector<T> part_outputs;
  if (splits > 1) {
    part_stats.resize(2 * splits * n);
    if (p.gathers()) part_outputs.resize(splits * n * p.d);
  }
  std::vector<SimilarityPart<T>> parts(chunks * splits);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t row0 = c * rows, row1 = std::min(n, row0 + rows);
      SimilarityPart<T>& part = parts[c * splits + s];
      part = {row0,
              row1,
              m * s / splits,
              m * (s + 1) / splits,
              p.row_max ? p.row_max + row0 : nullptr,
              p.row_sum ? p.row_sum + row0 : nullptr,
              nullptr,
              0};
      if (splits > 1) {
        part.row_max = &part_stats[2 * s * n + row0];
        part.row_sum = &part_stats[(2 * s + 1) * n + row0];
        if (p.gathers()) part.output = &part_outputs[(s * n + row0) * p.d];
        part.output_stride = p.d;
      }
    }
  threads.each(chunks * splits, [&](int64_t i) { kernels<In>().run_part(p, parts[i]); });
  if (splits > 1) threads.each(chunks, [&](int64_t c) { merge(p, parts, splits, c); });
}

template <class In>
void segment_sums(const Rows<In>& rows, int64_t d, const int64_t* segment, const Compute<In>* weight,
                  int64_t segments, Compute<In>* sums, const Threads& threads) {
  if (segments == 0 || d == 0) return;
  const int64_t most = kSumBytes / (segments * static_cast<int64_t>(sizeof(double)));
  const int64_t width =
      std::max(kLeastSumColumns,
               std::min(most, ceil_div(ceil_div(d, threads.count), kLeastSumColumns) * kLeastSumColumns));
  threads.each(ceil_div(d, width), [&](int64_t task) {
    const int64_t c0 = task * width, c1 = std::min(d, c0 + width);
    std::vector<double> part(segments * (c1 - c0), 0.0);
    kernels<In>().sum_columns(rows, c0, c1, segment, weight, part.data());
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t c = c0; c < c1; ++c)
        sums[s * d + c] = static_cast<Compute<In>>(part[s * (c1 - c0) + c - c0]);
  });
}

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
