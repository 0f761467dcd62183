// The one pass over N × M that everything rests on: rows X meet columns Y, their similarities become
// weights in an epilogue, and the weights may gather Y's rows into an output. No torch, no Python.
//
//   logits_ij  = scale · ⟨x_i, y_j⟩            (base 2: scale = log2(e) / temperature)
//   kSoftmax:    row_max_i ≥ logits_ij for all j,  row_sum_i = Σ_j 2^(logits_ij − row_max_i)
//                output_i  = Σ_j 2^(logits_ij − row_max_i) y_j / row_sum_i
//   kColumns:    output_i  = Σ_j column_weight_j · 2^(logits_ij − column_shift_j) y_j
//   kSymmetric:  output_i  = Σ_j (row_weight_i · 2^(logits_ij − row_shift_i)
//                                + column_weight_j · 2^(logits_ij − column_shift_j)) y_j
//   kShared:     the same where all shifts are one number: one exponential a pair
//   kTwoWay:     kSoftmax without an output, and the same of every column over the rows that meet it
//   kSoftplus:   row_sum_i = Σ_j softplus(t_ij),  row_max_i = Σ_j σ(t_ij),  output_i = Σ_j σ(t_ij) y_j
//                with t_ij = ln 2 · (logits_ij + row_shift_i)
//   kSigmoid:    output_i  = Σ_j column_weight_j · σ(ln 2 · (logits_ij + column_shift_j)) y_j
//   kKept:       column_output_j = Σ_i row_weight_i · softmax_ij x_i, from the weights that kSoftmax kept
//
// kSymmetric and kShared may send their weights both ways: to the rows as above, and to the columns as
//   column_output_j = Σ_i weight_ij x_i
//
// Excluded pairs and columns that a row does not meet have logit −∞.
#pragma once

#include <cstdint>
#include <limits>

#include "dtypes.h"
#include "threads.h"

namespace wscl {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// `count` rows of numbers; row r lies at data + (index ? index[r] : r) · stride. A position is a place in
// this order; an index list makes it possible to leave rows out or to sort them without moving them.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;
  const int64_t* index = nullptr;
  int64_t count = 0;
  FloatKind kind = {};  // of T = AnyFloat, whose stride is in bytes

  int64_t origin(int64_t position) const {
    return index ? index[position] : position;
  }
  const T* row(int64_t position) const {
    return data + origin(position) * stride;
  }
};

struct Pair {
  int64_t row, column;  // positions
};

// Room in which kTwoWay leaves the logits of as many parts as it lasts for. kSymmetric and kShared with outputs
// for both sides find them there, over the same meeting; the others they make again, and all of them where they
// run on another number of threads or another instruction set.
template <class T>
struct KeptLogits {
  T* data = nullptr;
  int64_t size = 0;  // numbers
};

enum class Epilogue { kSoftmax, kColumns, kSymmetric, kShared, kTwoWay, kSoftplus, kSigmoid, kKept };

// Columns that a kernel takes at a time: at most, where it has no tiles, and at least.
constexpr int64_t kBlock = 128, kLeastBlock = 32;

// What a pass is told, but for the rows themselves.
template <class T>
struct SimilarityNumbers {
  int64_t d = 0;
  T scale = 1;
  Epilogue epilogue = Epilogue::kSoftmax;

  const Pair* excluded = nullptr;  // sorted by row
  int64_t excluded_count = 0;
  const int64_t* begin = nullptr;  // [n] row i meets columns [begin_i, end_i) only; both non-decreasing
  const int64_t* end = nullptr;    // [n]
  bool outside = false;            // or those outside of it only

  const T* row_shift = nullptr;      // [n]
  const T* row_weight = nullptr;     // [n]
  const T* column_shift = nullptr;   // [m]
  const T* column_weight = nullptr;  // [m]
  T shift = 0;                       // kShared

  // By position. Of softmaxes a bound of the logits, an integer, and the sum relative to it, which is 0 where
  // nothing is met; those of columns go on from what stands there.
  double* row_max = nullptr;     // [n]
  double* row_sum = nullptr;     // [n]
  double* column_max = nullptr;  // [m] kTwoWay
  double* column_sum = nullptr;  // [m]

  // With o = x.origin(i), row i's output goes to output + o · output_stride, or rounded to In to
  // narrow_output + o · output_stride: times alpha, plus row offset_row[o] of `offset` if that is not below 0,
  // plus what stands there if `accumulate`. No output: nothing is gathered, the second GEMM is not done.
  T* output = nullptr;
  int64_t output_stride = 0;
  T alpha = 1;
  bool accumulate = false;
  const T* offset = nullptr;            // [·, d]
  const int64_t* offset_row = nullptr;  // [x's origins]

  // With o = y.origin(j), what column j gathers is added to column_output + o · column_output_stride, times
  // alpha. It may be the rows' output, if that accumulates. kKept takes offset, offset_row (of y's origins) and
  // accumulate for the columns.
  T* column_output = nullptr;
  int64_t column_output_stride = 0;

  KeptLogits<T> logits;
  bool logits_known = false;

  // Sums of the columns' clusters, taken along since the pass reads the columns anyway:
  //   segment_sums[s][c] = Σ_{j: column_segment_o = s} y_j[c] with o = y.origin(j)
  T* segment_sums = nullptr;                // [segments, d] or null
  const int64_t* column_segment = nullptr;  // [y's origins]
  int64_t segments = 0;

  bool to_columns() const {
    return column_output || column_max;
  }
};

template <class In>
struct SimilarityParams : SimilarityNumbers<Compute<In>> {
  Rows<In> x;  // [n, d]
  Rows<In> y;  // [m, d]
  In* narrow_output = nullptr;

  bool gathers() const {
    return this->output || narrow_output;
  }
};

// What kSoftmax leaves of a part for kKept: the weights, and the rows' shifts under which they were made. A
// block's room is that of `block` columns, whatever it holds.
template <class T>
struct KeptWeights {
  T* weights = nullptr;  // [block of columns][panel of rows][column][lane]
  T* shifts = nullptr;   // [block of columns][row]
};

// A part of a pass: rows [row0, row1) against columns [column0, column1). Results of a pass that is split
// over columns lie in the part's own arrays, indexed by position − row0.
template <class T>
struct SimilarityPart {
  int64_t row0, row1, column0, column1;
  double* row_max;        // [row1 − row0]
  double* row_sum;        // [row1 − row0]
  T* output;              // null: the parameters' output, finished
  int64_t output_stride;  // of `output`

  double* segment_sums = nullptr;        // [segments, d] to which the part adds columns
  int64_t sums_begin = 0, sums_end = 0;  // [sums_begin, sums_end)

  KeptWeights<T> kept;
  T* logits = nullptr;  // [block of columns][panel of rows][column][lane], as they come from the product
};

// Runs a pass on all threads: rows are cut into chunks, and where there are too few rows to keep the
// threads busy, columns as well; the parts are then merged in order. Where columns get results, every thread
// has columns of its own, and the chunks of rows follow one another. The result depends on the number of
// threads only through that cut, never on timing.
template <class In>
void run_similarity(const SimilarityParams<In>& params, const Threads& threads);

// A kSoftmax pass over all pairs with the rows' output, and with it the kKept pass of the same pairs: three
// products, since the weights of some rows at a time are kept until the sums of these rows are whole. They take
// 28 MiB at most, or what those of a panel of rows take. Float and double alone.
template <class In>
void run_softmax_both(const SimilarityParams<In>& rows, SimilarityParams<In> columns, const Threads& threads);

// sums[s][c] = Σ_{r: segment_o = s} weight_o · rows[r][c] with o = rows.origin(r), accumulated in double. Rows
// of a segment below 0 are left out; weights may be null.
template <class In>
void segment_sums(const Rows<In>& rows, int64_t d, const int64_t* segment, const Compute<In>* weight,
                  int64_t segments, Compute<In>* sums /* [segments, d] */, const Threads& threads);

// One instruction set's kernels.
template <class In>
struct TypedKernels {
  void (*run_part)(const SimilarityParams<In>&, const SimilarityPart<Compute<In>>&);
  // Columns [c0, c1) of segment_sums over rows [r0, r1), added to sums[segments][c1 − c0].
  void (*sum_columns)(const Rows<In>& rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
                      const int64_t* segment, const Compute<In>* weight, double* sums);
};

struct SimilarityKernels {
  const char* name;
  // Runs `rounds` of independent float32 multiply-adds and returns how many flops that was.
  double (*multiply_add)(int64_t rounds);
  TypedKernels<float> of_float;
  TypedKernels<double> of_double;
  TypedKernels<BFloat16> of_bfloat16;
  TypedKernels<Float16> of_float16;
  double (*bfloat16_dot)(int64_t rounds) = nullptr;  // null without an instruction for it
};

// What takes the place of the AVX-512 kernels where there are instructions for products of bfloat16.
struct BFloat16Kernels {
  TypedKernels<BFloat16> of_bfloat16;
  double (*dot)(int64_t rounds);  // as multiply_add
};

extern const SimilarityKernels kSimilarityPortable;
#if defined(__x86_64__)
extern const SimilarityKernels kSimilarityAvx2;
extern const SimilarityKernels kSimilarityAvx512;
extern const BFloat16Kernels kSimilarityAvx512Bf16;
extern const BFloat16Kernels kSimilarityAvx512Amx;
#endif

}  // namespace wscl
