// Sums over keys weighed by the tags that they share with a query, on the CPU. No torch, no Python.
//
//   w_ij  = 1 if a_i ∩ b_j is not empty, else 0 (kShared), or |a_i ∩ b_j| / |a_i ∪ b_j| (kJaccard; 0 for two
//   empty sets) sum_i = Σ_j w_ij v_j,   total_i = Σ_j w_ij
//
// A tag set is `words` words of 64 bits. In plain PyTorch `W @ values, W.sum(1)`; here W lives in tiles of a
// few rows and kTagColumns columns. Its transpose is the same problem with the sides exchanged, and so is the
// gradient of `values`.
#pragma once

#include <cstdint>

#include "threads.h"

namespace wscl {

enum class TagWeight { kShared = 0, kJaccard = 1 };

template <class T>
struct TagProblem {
  const int64_t* row_tags;  // [n, words]
  int64_t n;
  const int64_t* column_tags;  // [m, words]
  int64_t m;
  int64_t words;
  const T* values;  // [m, d], unit column stride
  int64_t value_stride;
  int64_t d;
  TagWeight weight;
};

// Each row is summed by one thread, column after column in a fixed order: the result does not depend on timing
// or on the number of threads.
template <class T>
void tag_weighted_sum(const TagProblem<T>& problem, T* sums /* [n, d] */, double* totals /* [n] */,
                      const Threads& threads);

constexpr int kTagRows = 4;        // of a register tile
constexpr int kTagColumns = 256;   // summed in the dtype of the values, then added in double
constexpr int kTagBlockRows = 16;  // that share a block of columns in cache

// Rows [row0, row1), at most kTagBlockRows, by one instruction set's kernel. `accumulator` has room for their d
// sums each.
template <class T>
using TagKernel = void (*)(const TagProblem<T>&, int64_t row0, int64_t row1, const double* column_counts,
                           double* accumulator, double* totals);

struct TagKernels {
  TagKernel<float> of_float;
  TagKernel<double> of_double;
};

extern const TagKernels kTagsPortable;
#if defined(__x86_64__)
extern const TagKernels kTagsAvx2;
extern const TagKernels kTagsAvx512;
#endif

}  // namespace wscl
