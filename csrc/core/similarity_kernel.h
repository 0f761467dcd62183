// The pass of similarity.h for one instruction set (included by similarity_<isa>.cpp).
//
// In PyTorch:   S = scale * x @ y.T;  W = epilogue(S);  output = W @ y
//
// Tile map. A thread owns a chunk of rows and streams the columns past it in blocks that stay in L2:
//
//   pack x's chunk once as      [row block][d][kRows]           broadcast operand
//   for each block of columns:
//     pack y's block as         [panel][d][kColumns]            vector operand of the first GEMM
//     and, for an output, as    [panel of d][block][kColumns]   vector operand of the second
//     for each row block:
//       S[kRows][block]   = first GEMM, kRows × kColumns accumulators in registers, d deep
//       W                 = epilogue(S) in place: S lives in L1
//       O[kRows][d]      += second GEMM, `block` deep
//
// Memory traffic: x, y and the output once a chunk; S never leaves L1. The cost beside the GEMMs is the
// epilogue, about 14 vector operations for kWidth pairs against d multiply-adds.
//
// A row's shift (its "maximum") is an upper bound of its logits, rounded up to an integer so that changing it
// rescales by an exact power of two. Where Cauchy-Schwarz gives a bound so low that no exponential can
// underflow, that bound is taken and no maximum is looked for; else the block's own maximum.
#pragma once

#include <cmath>
#include <cstdlib>

#include "similarity.h"
#include "similarity_tiles.h"

namespace wscl {
namespace WSCL_ISA {

// Columns of a block: S[kRows][kBlock] takes at most 12 KiB of L1.
template <class T>
constexpr int kBlock = 1024 / sizeof(T);
constexpr int64_t kBlockBytes = 192 * 1024;
// Logits within ± this need no maximum: 2^(−2 · kSafeLogit) is far above the smallest normal number.
template <class T>
constexpr T kSafeLogit = sizeof(T) == sizeof(float) ? 48 : 400;

// A chunk's memory: one allocation, cut into aligned pieces.
template <class T>
struct Workspace {
  T* x_packed;       // [row blocks][d][kRows]
  T* y_packed;       // [panels][d][kColumns]
  T* y_panels;       // [panels of d][block][kColumns], for an output
  T* output;         // [rows][d rounded up], for an output
  T* logits;         // [kRows][kBlock]
  T* norms;          // [rows]
  T* column_shift;   // [kBlock]
  T* column_weight;  // [kBlock]
  void* memory;

  Workspace(int64_t rows, int64_t block, int64_t d, int64_t d_padded, bool with_output) {
    const int64_t sizes[] = {rows * d,
                             block * d,
                             with_output ? block * d_padded : 0,
                             with_output ? rows * d_padded : 0,
                             kRows * kBlock<T>,
                             rows,
                             kBlock<T>,
                             kBlock<T>};
    T** pieces[] = {&x_packed, &y_packed, &y_panels, &output, &logits, &norms, &column_shift, &column_weight};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size * sizeof(T), 64);
    memory = std::aligned_alloc(64, larger(total, 64));
    char* at = static_cast<char*>(memory);
    for (int i = 0; i < 8; ++i) {
      *pieces[i] = reinterpret_cast<T*>(at);
      at += round_up(sizes[i] * sizeof(T), 64);
    }
  }
  ~Workspace() {
    std::free(memory);
  }
};

template <class T, Epilogue kEpilogue, bool kOutput>
struct Pass {
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();

  const SimilarityParams<T>& params;
  const SimilarityPart<T>& part;
  const int64_t rows;      // of this part
  const int64_t d_padded;  // d as the second GEMM sees it
  const int64_t block;     // columns of a block
  Workspace<T> space;
  int64_t first_excluded;  // of this part's rows
  T column_norm = 0;       // the largest of the block's

  Pass(const SimilarityParams<T>& p, const SimilarityPart<T>& part)
      : params(p),
        part(part),
        rows(part.row1 - part.row0),
        d_padded(round_up(p.d, kColumns<T>)),
        block(larger(kColumns<T>, smaller(kBlock<T>, kBlockBytes / larger(1, p.d * int64_t(sizeof(T))) /
                                                         kColumns<T> * kColumns<T>))),
        space(round_up(rows, kRows), block, p.d, d_padded, kOutput) {
    int64_t low = 0, high = p.excluded_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.excluded[middle].row < part.row0)
        low = middle + 1;
      else
        high = middle;
    }
    first_excluded = low;
  }

  void run() {
    for (int64_t r = 0; r < rows; r += kRows)
      pack_rows<T, kRows>(params.x, part.row0 + r, smaller(kRows, rows - r), params.d,
                          space.x_packed + r * params.d);
    if (kOutput)
      for (int64_t i = 0; i < round_up(rows, kRows) * d_padded; ++i) space.output[i] = 0;
    if (kEpilogue == Epilogue::kSoftmax)
      for (int64_t i = 0; i < rows; ++i) {
        part.row_max[i] = -kInfinity;
        part.row_sum[i] = 0;
        space.norms[i] = norm(params.x.row(part.row0 + i));
      }

    int64_t column0 = part.column0, column1 = part.column1;
    if (params.begin && !params.outside && rows > 0) {
      column0 = larger(column0, params.begin[part.row0]);
      column1 = smaller(column1, params.end[part.row1 - 1]);
    }
    for (int64_t c = column0; c < column1; c += block) stream_block(c, smaller(block, column1 - c));
    finish();
  }

  void stream_block(int64_t c0, int64_t count) {
    const int64_t padded = round_up(count, kColumns<T>);
    Vector<T> largest = {};
    for (int64_t c = 0; c < padded; c += kColumns<T>)
      largest = maximum<T>(largest, pack_columns<T>(params.y, c0 + c, smaller(kColumns<T>, count - c), params.d,
                                                    space.y_packed + c * params.d));
    // A NaN or an infinity in the block makes the bound useless, and the maximum is looked for.
    column_norm = std::sqrt(horizontal_max<T>(largest));
    if (kOutput) pack_panels<T>(params.y, c0, count, params.d, space.y_panels);
    if (kEpilogue != Epilogue::kSoftmax)
      for (int64_t c = 0; c < padded; ++c) {
        if (kEpilogue != Epilogue::kShared) space.column_shift[c] = c < count ? params.column_shift[c0 + c] : 0;
        space.column_weight[c] = c < count ? params.column_weight[c0 + c] : 0;
      }

    int64_t excluded = first_excluded;
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t live = smaller(kRows, rows - r);
      const int64_t excluded_before = excluded;
      while (excluded < params.excluded_count && params.excluded[excluded].row < part.row0 + r + live)
        ++excluded;
      if (meets_none(part.row0 + r, part.row0 + r + live - 1, c0, c0 + count)) continue;
      for (int64_t c = 0; c < padded; c += kColumns<T>)
        gemm_tile<T, 1, kRows, false>(space.x_packed + r * params.d, space.y_packed + c * params.d, params.d,
                                      space.logits + c, kBlock<T>);
      mask(r, live, c0, count, padded, excluded_before, excluded);
      for (int64_t i = 0; i < live; ++i) weigh(r + i, space.logits + i * kBlock<T>, padded);
      if (kOutput)
        for (int64_t c = 0; c < d_padded; c += kColumns<T>)
          gemm_tile<T, kBlock<T>, 1, true>(space.logits, space.y_panels + c * count, count,
                                           space.output + r * d_padded + c, d_padded);
    }
  }

  void mask(int64_t r, int64_t live, int64_t c0, int64_t count, int64_t padded, int64_t excluded,
            int64_t excluded_end) {
    if (padded != count)
      for (int64_t i = 0; i < live; ++i)
        for (int64_t c = count; c < padded; ++c) space.logits[i * kBlock<T> + c] = -kInfinity;
    for (; excluded < excluded_end; ++excluded) {
      const int64_t c = params.excluded[excluded].column - c0;
      if (c >= 0 && c < count)
        space.logits[(params.excluded[excluded].row - part.row0 - r) * kBlock<T> + c] = -kInfinity;
    }
    if (params.begin)
      for (int64_t i = 0; i < live; ++i) {
        T* logits = space.logits + i * kBlock<T>;
        const int64_t begin = params.begin[part.row0 + r + i] - c0, end = params.end[part.row0 + r + i] - c0;
        if (params.outside) {
          for (int64_t c = larger(begin, 0); c < smaller(end, count); ++c) logits[c] = -kInfinity;
          continue;
        }
        for (int64_t c = 0; c < smaller(begin, count); ++c) logits[c] = -kInfinity;
        for (int64_t c = larger(end, 0); c < count; ++c) logits[c] = -kInfinity;
      }
  }

  // Whether none of the rows [first, last] meets a column of [c0, c1).
  bool meets_none(int64_t first, int64_t last, int64_t c0, int64_t c1) const {
    if (!params.begin) return false;
    return params.outside ? params.begin[last] <= c0 && params.end[first] >= c1
                          : params.begin[first] >= c1 || params.end[last] <= c0;
  }

  T largest_logit(const T* logits, int64_t padded) const {
    Vector<T> top = load(logits);
    for (int64_t c = kWidth; c < padded; c += kWidth) top = maximum<T>(load(logits + c), top);
    return horizontal_max<T>(top) * params.scale;
  }

  T norm(const T* row) const {
    double sum = 0;
    for (int64_t c = 0; c < params.d; ++c) sum += static_cast<double>(row[c]) * row[c];
    return static_cast<T>(std::sqrt(sum));
  }

  // Logits of row i of this part become its weights.
  void weigh(int64_t i, T* logits, int64_t padded) {
    const Vector<T> scale = broadcast(params.scale);
    if (kEpilogue == Epilogue::kSoftmax) {
      const T bound = std::ceil(params.scale * space.norms[i] * column_norm * T(1.0001));
      const T best = bound <= kSafeLogit<T> ? bound : std::ceil(largest_logit(logits, padded));
      T row_max = static_cast<T>(part.row_max[i]);
      if (!(best <= row_max)) {  // also where NaN came in
        const T shrink = row_max == -kInfinity ? T(0) : std::exp2(row_max - best);
        part.row_max[i] = row_max = best;
        part.row_sum[i] *= shrink;
        if (kOutput) {
          T* output = space.output + i * d_padded;
          for (int64_t c = 0; c < d_padded; c += kWidth)
            store(output + c, load(output + c) * broadcast(shrink));
        }
      }
      if (row_max == -kInfinity) {  // nothing but masked columns so far
        for (int64_t c = 0; c < padded; ++c) logits[c] = 0;
        return;
      }
      const Vector<T> shift = broadcast(row_max);
      Vector<T> sum = {};
      for (int64_t c = 0; c < padded; c += kWidth) {
        const Vector<T> weight = exp2<T>(load(logits + c) * scale - shift);
        sum += weight;
        if (kOutput) store(logits + c, weight);
      }
      part.row_sum[i] += horizontal_sum<T>(sum);
    } else if (kEpilogue == Epilogue::kColumns) {
      for (int64_t c = 0; c < padded; c += kWidth)
        store(logits + c,
              load(space.column_weight + c) * exp2<T>(load(logits + c) * scale - load(space.column_shift + c)));
    } else if (kEpilogue == Epilogue::kShared) {
      const Vector<T> shift = broadcast(params.shift), weight = broadcast(params.row_weight[part.row0 + i]);
      for (int64_t c = 0; c < padded; c += kWidth)
        store(logits + c, (weight + load(space.column_weight + c)) * exp2<T>(load(logits + c) * scale - shift));
    } else {
      const Vector<T> shift = broadcast(params.row_shift[part.row0 + i]);
      const Vector<T> weight = broadcast(params.row_weight[part.row0 + i]);
      for (int64_t c = 0; c < padded; c += kWidth) {
        const Vector<T> logit = load(logits + c) * scale;
        store(logits + c, weight * exp2<T>(logit - shift) +
                              load(space.column_weight + c) * exp2<T>(logit - load(space.column_shift + c)));
      }
    }
  }

  void finish() {
    if (!kOutput) return;
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = space.output + i * d_padded;
      if (part.output) {  // to be merged with other parts: as it is
        T* to = part.output + i * part.output_stride;
        for (int64_t c = 0; c < params.d; ++c) to[c] = from[c];
        continue;
      }
      T* to = params.output + params.x.origin(part.row0 + i) * params.output_stride;
      T factor = params.alpha;
      if (kEpilogue == Epilogue::kSoftmax)
        factor = part.row_sum[i] == 0 ? T(0) : static_cast<T>(params.alpha / part.row_sum[i]);
      if (params.accumulate)
        for (int64_t c = 0; c < params.d; ++c) to[c] += factor * from[c];
      else
        for (int64_t c = 0; c < params.d; ++c) to[c] = factor * from[c];
    }
  }
};

template <class T, Epilogue kEpilogue, bool kOutput>
void run_pass(const SimilarityParams<T>& params, const SimilarityPart<T>& part) {
  Pass<T, kEpilogue, kOutput>(params, part).run();
}

template <class T>
void run(const SimilarityParams<T>& params, const SimilarityPart<T>& part) {
  switch (params.epilogue) {
    case Epilogue::kSoftmax:
      return params.output ? run_pass<T, Epilogue::kSoftmax, true>(params, part)
                           : run_pass<T, Epilogue::kSoftmax, false>(params, part);
    case Epilogue::kColumns:
      return run_pass<T, Epilogue::kColumns, true>(params, part);
    case Epilogue::kSymmetric:
      return run_pass<T, Epilogue::kSymmetric, true>(params, part);
    case Epilogue::kShared:
      return run_pass<T, Epilogue::kShared, true>(params, part);
  }
}

template <class T>
void sum_columns(const Rows<T>& rows, int64_t c0, int64_t c1, const int64_t* segment, const T* weight,
                 double* sums) {
  const int64_t width = c1 - c0;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (segment[r] < 0) continue;
    const T* __restrict source = rows.row(r) + c0;
    double* __restrict sum = sums + segment[r] * width;
    const double factor = weight ? weight[r] : 1;
    for (int64_t c = 0; c < width; ++c) sum[c] += factor * source[c];
  }
}

// What the processor can do at most: enough chains to cover the latency, nothing loaded or stored.
inline double multiply_add(int64_t rounds) {
  constexpr int kChains = 12;
  const Vector<float> factor = broadcast(0.999f), summand = broadcast(0.001f);
  Vector<float> chain[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) chain[c] = broadcast(float(c));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      chain[c] = chain[c] * factor + summand;
      WSCL_KEEP(chain[c]);  // one multiply-add after the other, as written
    }
  }
  return 2.0 * rounds * kChains * Simd<float>::kWidth;
}

template <class T>
constexpr TypedKernels<T> kKernels = {run<T>, sum_columns<T>};

}  // namespace WSCL_ISA
}  // namespace wscl
