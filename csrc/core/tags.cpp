// Cuts the rows of tags.h among the threads.
#include "tags.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu.h"

namespace wscl {
namespace {

const TagKernels& kernels() {
  const std::string name = cpu_kernels().name;
#if defined(__x86_64__)
  if (name == kSimilarityAvx2.name) return kTagsAvx2;
  if (name != kSimilarityPortable.name) return kTagsAvx512;
#endif
  return kTagsPortable;
}

template <class T>
TagKernel<T> kernel() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().of_float;
  else
    return kernels().of_double;
}

}  // namespace

template <class T>
void tag_weighted_sum(const TagProblem<T>& p, T* sums, double* totals, const Threads& threads) {
  std::vector<double> column_counts(p.m);
  for (int64_t c = 0; c < p.m; ++c) {
    int count = 0;
    for (int64_t w = 0; w < p.words; ++w)
      count += __builtin_popcountll(static_cast<uint64_t>(p.column_tags[c * p.words + w]));
    column_counts[c] = count;
  }
  const int64_t blocks = (p.n + kTagBlockRows - 1) / kTagBlockRows;
  threads.ranges(blocks, 1, [&](int64_t begin, int64_t end) {
    static_assert(kTagBlockRows % kTagRows == 0, "a tile's rows have their places, also beyond the last row");
    std::vector<double> accumulator(kTagBlockRows * p.d);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row0 = block * kTagBlockRows, row1 = std::min(p.n, row0 + kTagBlockRows);
      std::fill(accumulator.begin(), accumulator.end(), 0.0);
      std::fill(totals + row0, totals + row1, 0.0);
      kernel<T>()(p, row0, row1, column_counts.data(), accumulator.data(), totals + row0);
      for (int64_t i = 0; i < (row1 - row0) * p.d; ++i) sums[row0 * p.d + i] = static_cast<T>(accumulator[i]);
    }
  });
}

template void tag_weighted_sum<float>(const TagProblem<float>&, float*, double*, const Threads&);
template void tag_weighted_sum<double>(const TagProblem<double>&, double*, double*, const Threads&);

}  // namespace wscl
