// The pass of similarity.h on a CUDA device: rows X meet columns Y, their similarities become weights in an
// epilogue, and the weights may gather Y's rows. No torch, no Python; pointers are device memory.
//
//   logits_ij   = log2(e) · scale · ⟨x_i, y_j⟩
//   kSoftmax:     shift_i an integer,  sum_i = Σ_j 2^(logits_ij − shift_i)
//                 output_i = Σ_j 2^(logits_ij − shift_i) y_j
//   kColumns:     output_i = Σ_j weight_j · 2^(logits_ij − shift_j) y_j
//   kSymmetric:   output_i = Σ_j (weight_i · 2^(logits_ij − shift_i) + weight_j · 2^(logits_ij − shift_j)) y_j
//   kBoth:        sum_i = Σ_j 2^logits_ij,  column_sum_j = Σ_i 2^logits_ij, one exponential for both
//
//   kSigmoid:     t_ij = logits_ij + shift_i,  sum_i = Σ_j log(1 + 2^t_ij),  slope_i = Σ_j σ_ij,
//                 output_i = sigmoid_boost() · Σ_j σ_ij y_j,  σ_ij = 1 / (1 + 2^−t_ij)
//   kSigmoidColumns:  output_i = Σ_j weight_j σ_ij y_j,  t_ij = logits_ij + shift_j
//
//   kTags:        output_i = Σ_j w_ij y_j,  total_i = Σ_j w_ij,  w_ij from the bits of row i's and column j's
//                 tags, with no logits; launched by tags_cuda.cu
//
// Results are partial: the columns are split among `splits` parts, each with its own shift, sum and output,
// which whoever called merges (merge order is fixed, so are the bits). The first rows may have one part only:
// as many as fill the device so many times over, so that the last wave of CTAs alone is split.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace wscl::cuda {

// How numbers come in and how they are multiplied. Accumulation is in float32 always.
//   kFloat32: as three bfloat16 terms, six products: float32's accuracy (what is dropped is below 2^-24).
//   kFloat32Fast: as two terms, three products: 2^-16, for those who allow TF32 (2^-11).
enum class Precision : int { kBFloat16, kFloat16, kFloat32, kFloat32Fast };

constexpr int element_size(Precision precision) {
  return precision == Precision::kBFloat16 || precision == Precision::kFloat16 ? 2 : 4;
}

// `count` < 2^31 rows; row r lies at data + (index ? index[r] : r) · stride.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements
  const int64_t* index = nullptr;
  int64_t count = 0;
};

enum class Epilogue : int { kSoftmax, kColumns, kSymmetric, kBoth, kSigmoid, kSigmoidColumns, kTags };

constexpr int kValidBits = 64;

// What the shifts of a pass over given ones are: of rows and columns each its own; one number; or each its own,
// and some of them far.
enum class Shifts : int32_t { kEach, kOne, kFar };

struct SimilarityParams {
  Precision precision = Precision::kFloat32;
  Epilogue epilogue = Epilogue::kSoftmax;
  Rows x;  // [n, d]
  Rows y;  // [m, d]
  int64_t x_origin = 0;
  int64_t d = 0;
  const float* scale = nullptr;  // 1 / temperature

  const uint64_t* y_valid = nullptr;  // bit j % 64 of word j / 64: column j takes part; null: all do
  // Pairs that never meet, as positions (of rows: + x_origin); −1 for none. At most one of the two.
  const int32_t* row_excluded = nullptr;     // [n] the column that a row does not meet
  const int32_t* column_excluded = nullptr;  // [m] the row that a column does not meet
  const int2* excluded_range = nullptr;      // least and greatest column_excluded of every 64 columns
  const float* excluded_weight = nullptr;    // kColumns: weight of such a pair, by column; null: 0
  const int32_t* begin = nullptr;  // [n] row i meets columns [begin_i, end_i) only; both non-decreasing
  const int32_t* end = nullptr;    // [n]
  bool outside = false;            // row i meets the columns outside of that range instead

  // The pass is made where *gate is gate_value; null: it is.
  const int32_t* gate = nullptr;
  int32_t gate_value = 0;

  // kColumns and kSymmetric; of columns, padded to a multiple of 64 with zeros.
  const float* row_shift = nullptr;      // [n]
  const float* row_weight = nullptr;     // [n]
  const float* column_shift = nullptr;   // [m]
  const float* column_weight = nullptr;  // [m]
  const Shifts* shifts = nullptr;        // what they are; kOne: kSymmetric alone looks

  // kBoth. Logits have to be small enough for a sum of 2^logits; see logsumexp_both_cuda.cuh.
  const uint64_t* x_valid = nullptr;  // as y_valid, of rows; null: all take part
  bool triangular = false;            // y is x: every unordered pair is met once, and counts for both
  int64_t first_block = 0;            // the rows are `blocks` blocks of block_rows(), from this one on
  int64_t blocks = 0;
  float* column_sum = nullptr;  // [blocks, column_stride]; written where the block met a column that takes part
  int64_t column_stride = 0;    // at least m

  // kTags; of x the count alone.
  const uint64_t* row_tags = nullptr;     // [n, words]
  const uint64_t* column_tags = nullptr;  // [m, words]
  int64_t words = 0;
  bool jaccard = false;     // |a ∩ b| / |a ∪ b|; else 1 where a ∩ b is not empty
  double* total = nullptr;  // [splits, n]

  int splits = 1;
  int64_t whole_rows = 0;  // the first ones, whole blocks or all, that have one part
  // Part s of row i is number part_place(s, i, n, whole_rows); with no whole rows that is [splits, n].
  float* shift = nullptr;   // [splits, n] kSoftmax
  float* sum = nullptr;     // [splits, n] kSoftmax; 0 for a row that meets no column
  float* slope = nullptr;   // [splits, n] kSigmoid
  float* output = nullptr;  // [splits, n, output_stride]; null: no second product
  int64_t output_stride = 0;
};

// All rows' first parts, then the second parts of those rows that have one, and so on.
__host__ __device__ inline int64_t part_place(int64_t part, int64_t row, int64_t rows, int64_t whole_rows) {
  return part * (rows - whole_rows) + row;
}

struct Split {
  int splits;
  int64_t whole_rows;
};
// Parts that keep the device busy, for this many rows and columns, with a second product or without.
Split choose_split(const SimilarityParams& params, bool output);

// Rows that a CTA takes.
constexpr int block_rows(Precision precision) {
  return element_size(precision) == 2 ? 128 : 64;
}

constexpr float sigmoid_boost(Precision precision) {
  return precision == Precision::kFloat16 ? 16384.f : 1.f;
}

// CTAs' worth of rows.
constexpr int64_t blocks_of(const SimilarityParams& p) {
  const int rows = block_rows(p.precision);
  return p.epilogue == Epilogue::kBoth ? p.blocks : (p.x.count + rows - 1) / rows;
}

// What output_stride has to be.
constexpr int64_t padded_width(int64_t d) {
  return (d + 3) / 4 * 4;
}

// Enqueues the pass on a stream; the result says whether that went well.
cudaError_t run_similarity(const SimilarityParams& params, cudaStream_t stream);

}  // namespace wscl::cuda
