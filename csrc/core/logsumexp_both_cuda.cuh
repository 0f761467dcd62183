// Log-sum-exps over the columns of every row and over the rows of every column, from one product.
//
// Where Cauchy-Schwarz bounds all logits so that 2^logit and its sums stay in float's normal range (for unit
// vectors: temperature ≥ 0.017), no shift is needed and one exponential serves both. Elsewhere each side gets a
// pass with its own running maximum. Which of the two happens is decided on the device: both are enqueued, and
// one of them returns at once.
#pragma once

#include "infonce_passes_cuda.cuh"

namespace wscl::cuda {

struct LogSumExpBoth {
  SoftmaxParts rows, columns;  // one part each; `columns` only where columns are not the rows

  LogSumExpBoth() = default;
  // The pass says what X and Y are, who takes part and row_excluded; with `triangular` Y is X.
  // `transposed` is the pass of the columns' own maximum: it says the columns' exclusions.
  LogSumExpBoth(const SimilarityParams& pass, const SimilarityParams& transposed, Workspace& space);
  cudaError_t run(cudaStream_t stream) const;

  SimilarityParams pass, by_rows, by_columns;
  SoftmaxParts row_parts, column_parts;  // of the passes with a running maximum
  int64_t rows_of_block;
  int64_t blocks, band;      // of rows: in all, and in one launch
  float *x_norms, *y_norms;  // the largest square of a norm, by block
  int32_t* small;            // whether logits are small
  double* column_total;      // [m]
};

}  // namespace wscl::cuda
