// The pass over weights that a softmax pass kept, for one instruction set: what columns gather of the rows.
//
// In PyTorch:   column_output = alpha * (row_weight[:, None] * softmax(S, 1)).T @ x   (+ offset, + itself)
//
// Blocks of columns and panels of rows are those of similarity_kernel.h. A kept weight is 2^(logit − shift)
// under the shift that its row had then; what is left to the probability is a power of two and the row's sum, a
// factor for each lane.
#pragma once

#include "similarity_workspace.h"

namespace wscl {
namespace WSCL_ISA {

template <class T>
class KeptPass {
  static constexpr int kWidth = Simd<T>::kWidth;

 public:
  KeptPass(const SimilarityParams<T>& params, const SimilarityPart<T>& part)
      : params(params),
        part(part),
        rows(part.row1 - part.row0),
        padded(round_up(rows, kWidth)),
        d_padded(round_up(params.d, kWidth)),
        block(Operands<T>::block_rows(params.d, true)),
        in_place(d_padded == params.d),
        tiles(scatter_tiles<T>(block, d_padded)) {
    for (int round = 0; round < 2; ++round) {
      memory.cut(weights, block * kPanel<T>);
      memory.cut(factors, padded);
      memory.cut(tops, padded);
      memory.cut(output, block * d_padded);
      memory.cut(x_rows, rows);
      memory.cut(x_copy, in_place ? 0 : rows * d_padded);
      if (round == 0) memory.allocate();
    }
  }

  void run() {
    prepare_rows();
    for (int64_t c = part.column0; c < part.column1; c += block)
      stream_block(c, smaller(block, part.column1 - c));
  }

 private:
  void prepare_rows() {
    for (int64_t i = 0; i < padded; ++i) {
      const bool live = i < rows && params.row_sum[part.row0 + i] != 0;  // else it meets nothing
      factors[i] =
          live ? static_cast<T>(params.row_weight[part.row0 + i] / params.row_sum[part.row0 + i]) : T(0);
      tops[i] = live ? static_cast<T>(params.row_max[part.row0 + i]) : T(0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      x_rows[i] = params.x.row(part.row0 + i);
      if (in_place) continue;
      widen_row<T>(x_rows[i], params.d, d_padded, x_copy + i * d_padded);
      x_rows[i] = x_copy + i * d_padded;
    }
  }

  // The rows that the columns' next block is added to.
  void fetch_ahead(int64_t c0, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      next_rows[k] = reinterpret_cast<const char*>(params.column_output +
                                                   params.y.origin(c0 + k) * params.column_output_stride);
    ahead.write = {next_rows, count, params.d * int64_t(sizeof(T))};
    const int64_t lines = count * (ahead.write.bytes / Ahead::kLine + 1);
    ahead.write.lines = lines / (tiles * ((rows + kPanel<T> - 1) / kPanel<T>)) + 1;
  }

  void stream_block(int64_t c0, int64_t count) {
    if (c0 + count < part.column1) fetch_ahead(c0 + count, smaller(block, part.column1 - c0 - count));
    for (int64_t i = 0; i < count * d_padded; ++i) output[i] = 0;
    const int64_t before = c0 - part.column0;
    const T* const shifts = part.kept.shifts + before / block * padded;
    for (int64_t r = 0, live; r < rows; r += live) {
      live = panel_rows<T>(rows, r);
      const T* const kept = part.kept.weights + before * padded + r * block;
      if (live > 2 * kWidth)
        meet<3>(kept, shifts, r, live, count);
      else if (live > kWidth)
        meet<2>(kept, shifts, r, live, count);
      else
        meet<1>(kept, shifts, r, live, count);
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t origin = params.y.origin(c0 + k);
      const T* offset = params.offset && params.offset_row[origin] >= 0
                            ? params.offset + params.offset_row[origin] * params.d
                            : nullptr;
      write_row<T>(output + k * d_padded, params.d, params.alpha, offset, params.accumulate,
                   params.column_output + origin * params.column_output_stride);
    }
  }

  template <int kVectors>
  void meet(const T* kept, const T* shifts, int64_t row, int64_t live, int64_t count) {
    Vector<T> factor[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane = row + v * kWidth;
      factor[v] = load(factors + lane) * exp2<T>(load(shifts + lane) - load(tops + lane));
    }
    for (int64_t k = 0; k < count; ++k)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (k * kVectors + v) * kWidth;
        store(weights + at, load(kept + at) * factor[v]);
      }
    next_weights = reinterpret_cast<const char*>(kept + kVectors * kWidth * block);
    ahead.read = {&next_weights, 1, kVectors * kWidth * block * int64_t(sizeof(T))};
    ahead.read.lines = ahead.read.bytes / Ahead::kLine / tiles + 1;
    scatter_panel<Numbers<T>, kVectors>(weights, RowList<T>{x_rows + row}, count, live, d_padded, output,
                                        ahead);
  }

  const SimilarityParams<T>& params;
  const SimilarityPart<T>& part;
  const int64_t rows, padded;
  const int64_t d_padded;
  const int64_t block;  // columns in a block
  const bool in_place;  // x is read where it is

  const int64_t tiles;  // of a scatter
  const char* next_rows[kBlock];
  const char* next_weights;
  Aheads ahead;

  Workspace memory;
  T* weights;        // [block][lanes]: shares of the rows' softmaxes
  T* factors;        // [padded] that make a weight under `tops` a share
  T* tops;           // [padded] the rows' shifts in the end
  T* output;         // [block][d_padded]
  const T** x_rows;  // [rows]
  T* x_copy;         // [rows][d_padded] where x cannot be read in place
};

}  // namespace WSCL_ISA
}  // namespace wscl
