// The pass of similarity.h for one instruction set (included by similarity_<isa>.cpp).
//
// In PyTorch:   S = scale * x @ y.T;  W = epilogue(S);  output = W @ y
//
// Tile map. A thread owns a chunk of rows of x, packed once into panels of kPanel rows, and streams y past it
// in blocks that stay in L2, read where they are:
//
//   for each block of y:
//     for each panel of x:
//       S[block][panel]   = first product, kKeys × kPanel accumulators in registers, d deep
//       W                 = epilogue(S) in place: S lives in L1, a row of x is a lane
//       O[panel][d]      += second product, kGatherRows × 2 vectors in registers, `block` deep
//
// Memory traffic: x, y and the output once a chunk; S never leaves L1. The cost beside the products is the
// epilogue, about 10 vector operations for kWidth pairs against d multiply-adds.
//
// A row's shift (its "maximum") is an upper bound of its logits, rounded up to an integer so that changing it
// rescales by an exact power of two. Where Cauchy-Schwarz gives a bound so low that no exponential can
// underflow, that bound is taken and no maximum is looked for; else the block's own maximum.
#pragma once

#include "similarity_workspace.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kBlock = 128;  // rows of y in a block, at most: S takes 24 KiB
constexpr int64_t kLeastBlock = 32;
constexpr int64_t kBlockBytes = 192 * 1024;
// Logits within ± this need no maximum: 2^(−2 · kSafeLogit) is far above the smallest normal number.
template <class T>
constexpr T kSafeLogit = sizeof(T) == sizeof(float) ? 48 : 400;

template <class In, Epilogue kEpilogue, bool kGather>
struct Pass {
  using T = Compute<In>;
  using Element = WSCL_ISA::Element<In>;
  using Packed = WSCL_ISA::Packed<In>;
  static constexpr int kWidth = Simd<T>::kWidth;
  static constexpr T kInfinity = __builtin_huge_val();
  static constexpr bool kRowWeights = kEpilogue == Epilogue::kSymmetric || kEpilogue == Epilogue::kShared;

  const SimilarityParams<In>& params;
  const SimilarityPart<T>& part;
  const int64_t rows;      // of this part
  const int64_t d_padded;  // d as the second product sees it
  const int64_t block;     // rows of y in a block
  const int64_t depth;     // steps of the first product
  const bool in_place;     // y is read where it is
  int64_t first_excluded;  // of this part's rows
  T column_norm = 0;       // the largest of the block's

  Workspace memory;
  Packed* x_packed;                       // [panel][depth][lanes]
  Element* y_copy;                        // [block][d_padded] where y cannot be read in place
  uint32_t* y_pairs;                      // [block / 2][d_padded] for the second product of pairs
  T* output;                              // [rows][d_padded]
  T* logits;                              // [block][lanes], then the weights
  T *norms, *shifts, *weights;            // [rows]
  double* sums;                           // [rows]
  T* scratch;                             // [kWidth][d_padded]
  const Element* y_rows[kBlock + kKeys];  // of the block

  Pass(const SimilarityParams<In>& p, const SimilarityPart<T>& part)
      : params(p),
        part(part),
        rows(part.row1 - part.row0),
        d_padded(round_up(p.d, kWidth)),
        block(smaller(kBlock,
                      larger(kLeastBlock, kBlockBytes / larger(1, p.d * int64_t(sizeof(T))) / kKeys * kKeys))),
        depth(kPairs<In> ? (p.d + 1) / 2 : p.d),
        in_place(kPairs<In> ? p.d % 2 == 0 : sizeof(In) == sizeof(T) && (!kGather || d_padded == p.d)) {
    const int64_t padded = round_up(rows, kWidth);
    for (int round = 0; round < 2; ++round) {
      memory.cut(x_packed, padded * depth);
      memory.cut(y_copy, in_place ? 0 : block * d_padded);
      memory.cut(output, kGather ? padded * d_padded : 0);
      memory.cut(logits, (block + kKeys) * kPanel<T>);
      memory.cut(norms, padded);
      memory.cut(shifts, padded);
      memory.cut(weights, padded);
      memory.cut(sums, padded);
      memory.cut(y_pairs, kPairs<In> && kGather ? (block + 1) / 2 * d_padded : 0);
      memory.cut(scratch, kWidth * round_up(p.d, 2 * kWidth));
      if (round == 0) memory.allocate();
    }
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
    prepare_rows();
    int64_t column0 = part.column0, column1 = part.column1;
    if (params.begin && !params.outside && rows > 0) {
      column0 = larger(column0, params.begin[part.row0]);
      column1 = smaller(column1, params.end[part.row1 - 1]);
    }
    for (int64_t c = column0; c < column1; c += block) stream_block(c, smaller(block, column1 - c));
    finish();
  }

  void prepare_rows() {
    for (int64_t r = 0; r < rows; r += kPanel<T>) {
      const int64_t live = smaller(kPanel<T>, rows - r);
      const int vectors = static_cast<int>((live + kWidth - 1) / kWidth);
      pack_panel(params.x, part.row0 + r, live, vectors, params.d, scratch, x_packed + r * depth, norms + r);
    }
    const int64_t padded = round_up(rows, kWidth);
    if (kGather)
      for (int64_t i = 0; i < padded * d_padded; ++i) output[i] = 0;
    for (int64_t i = 0; i < padded; ++i) {
      norms[i] = std::sqrt(norms[i]);
      sums[i] = 0;
      const bool live = i < rows;
      if (kEpilogue == Epilogue::kSoftmax) shifts[i] = -kInfinity;
      if (kEpilogue == Epilogue::kSymmetric) shifts[i] = live ? params.row_shift[part.row0 + i] : 0;
      if (kRowWeights) weights[i] = live ? params.row_weight[part.row0 + i] : 0;
    }
  }

  void stream_block(int64_t c0, int64_t count) {
    for (int64_t k = 0; k < count + kKeys; ++k) {
      const In* row = params.y.row(c0 + smaller(k, count - 1));
      if (in_place) {
        y_rows[k] = reinterpret_cast<const Element*>(row);
        continue;
      }
      Element* const copy = y_copy + smaller(k, count - 1) * d_padded;
      y_rows[k] = copy;
      if (k >= count) continue;
      if constexpr (kPairs<In>) {
        std::memcpy(copy, row, params.d * sizeof(In));
        std::memset(static_cast<void*>(copy + params.d), 0, (d_padded - params.d) * sizeof(In));
      } else {
        widen_row<In>(row, params.d, d_padded, copy);
      }
    }
    if constexpr (kPairs<In> && kGather) interleave_rows(y_rows, count, params.d, d_padded, y_pairs);
    if (kEpilogue == Epilogue::kSoftmax) column_norm = largest_norm<T>(y_rows, count, params.d);

    int64_t excluded = first_excluded;
    for (int64_t r = 0; r < rows; r += kPanel<T>) {
      const int64_t live = smaller(kPanel<T>, rows - r);
      const int64_t excluded_before = excluded;
      while (excluded < params.excluded_count && params.excluded[excluded].row < part.row0 + r + live)
        ++excluded;
      // The columns of the block that any of the panel's rows can meet.
      const int64_t first = part.row0 + r, last = first + live - 1;
      int64_t k0 = 0, k1 = count;
      if (params.begin && !params.outside) {
        k0 = larger(k0, params.begin[first] - c0);
        k1 = smaller(k1, params.end[last] - c0);
      } else if (params.begin && params.begin[last] <= c0 && params.end[first] >= c0 + count) {
        k1 = 0;
      }
      if (k0 >= k1) continue;
      if (kPairs<In>) k0 -= k0 % 2;  // whole pairs; what a row does not meet is masked
      const Panel panel = {r, live, c0 + k0, k1 - k0, y_rows + k0, excluded_before, excluded};
      if (live > 2 * kWidth)
        meet<3>(panel);
      else if (live > kWidth)
        meet<2>(panel);
      else
        meet<1>(panel);
    }
  }

  struct Panel {
    int64_t row, live;        // rows of this part
    int64_t c0, count;        // columns
    const Element* const* y;  // their rows
    int64_t excluded, excluded_end;
  };

  // A panel of x meets some rows of y.
  template <int kVectors>
  void meet(const Panel& p) {
    logits_panel<kVectors>(p.y, p.count, x_packed + p.row * depth, params.d, logits);
    mask(p, kVectors * kWidth);
    weigh<kVectors>(p);
    if constexpr (kGather && kPairs<In>) {
      pair_weights(logits, p.count, kVectors * kWidth);
      gather_panel<kVectors>(reinterpret_cast<uint32_t*>(logits), y_pairs + (p.y - y_rows) / 2 * d_padded,
                             (p.count + 1) / 2, d_padded, output + p.row * d_padded);
    } else if constexpr (kGather) {
      gather_panel<kVectors>(logits, p.y, p.count, d_padded, output + p.row * d_padded);
    }
  }

  void mask(const Panel& p, int64_t lanes) {
    for (int64_t e = p.excluded; e < p.excluded_end; ++e) {
      const int64_t k = params.excluded[e].column - p.c0;
      if (k >= 0 && k < p.count) logits[k * lanes + params.excluded[e].row - part.row0 - p.row] = -kInfinity;
    }
    if (!params.begin) return;
    for (int64_t i = 0; i < p.live; ++i) {
      const int64_t row = part.row0 + p.row + i;
      const int64_t begin = params.begin[row] - p.c0, end = params.end[row] - p.c0;
      const auto hide = [&](int64_t from, int64_t to) {
        for (int64_t k = larger(from, 0); k < smaller(to, p.count); ++k) logits[k * lanes + i] = -kInfinity;
      };
      if (params.outside) {
        hide(begin, end);
      } else {
        hide(0, begin);
        hide(end, p.count);
      }
    }
  }

  // Logits become weights.
  template <int kVectors>
  void weigh(const Panel& p) {
    const Vector<T> scale = broadcast(params.scale);
    if constexpr (kEpilogue == Epilogue::kSoftmax) {
      raise_shifts<kVectors>(p);
      Vector<T> shift[kVectors], sum[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        shift[v] = load(shifts + p.row + v * kWidth);
        shift[v] = shift[v] == -kInfinity ? Vector<T>{} : shift[v];
        sum[v] = Vector<T>{};
      }
      for (int64_t k = 0; k < p.count; ++k)
        for (int v = 0; v < kVectors; ++v) {
          T* at = logits + (k * kVectors + v) * kWidth;
          const Vector<T> weight = exp2<T>(load(at) * scale - shift[v]);
          sum[v] += weight;
          if (kGather) store(at, weight);
        }
      for (int v = 0; v < kVectors; ++v)
        for (int i = 0; i < kWidth; ++i) sums[p.row + v * kWidth + i] += sum[v][i];
      return;
    }
    Vector<T> row_shift[kVectors], row_weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      row_shift[v] =
          kEpilogue == Epilogue::kSymmetric ? load(shifts + p.row + v * kWidth) : broadcast(params.shift);
      row_weight[v] = kRowWeights ? load(weights + p.row + v * kWidth) : Vector<T>{};
    }
    for (int64_t k = 0; k < p.count; ++k) {
      const Vector<T> column_weight = broadcast(params.column_weight[p.c0 + k]);
      Vector<T> column_shift = {};
      if (kEpilogue != Epilogue::kShared) column_shift = broadcast(params.column_shift[p.c0 + k]);
      for (int v = 0; v < kVectors; ++v) {
        T* at = logits + (k * kVectors + v) * kWidth;
        const Vector<T> logit = load(at) * scale;
        if (kEpilogue == Epilogue::kColumns)
          store(at, column_weight * exp2<T>(logit - column_shift));
        else if (kEpilogue == Epilogue::kShared)
          store(at, (row_weight[v] + column_weight) * exp2<T>(logit - row_shift[v]));
        else
          store(at,
                row_weight[v] * exp2<T>(logit - row_shift[v]) + column_weight * exp2<T>(logit - column_shift));
      }
    }
  }

  // Makes every lane's shift a bound of its logits, and rescales what was summed under a smaller one.
  template <int kVectors>
  void raise_shifts(const Panel& p) {
    const Vector<T> scale = broadcast(params.scale), safe = broadcast(kSafeLogit<T>);
    Vector<T> best[kVectors];
    typename Simd<T>::Bits bounded[kVectors];
    bool all_bounded = true;
    for (int v = 0; v < kVectors; ++v) {
      // A NaN or an infinity in the block makes the bound useless, and the maximum is looked for.
      best[v] =
          ceiling<T>(load(norms + p.row + v * kWidth) * broadcast<T>(params.scale * column_norm * T(1.0001)));
      bounded[v] = best[v] <= safe;
      all_bounded &= all<T>(bounded[v]);
    }
    if (!all_bounded) {
      Vector<T> top[kVectors];
      for (int v = 0; v < kVectors; ++v) top[v] = broadcast(-kInfinity);
      for (int64_t k = 0; k < p.count; ++k)
        for (int v = 0; v < kVectors; ++v)
          top[v] = maximum<T>(load(logits + (k * kVectors + v) * kWidth), top[v]);
      for (int v = 0; v < kVectors; ++v) best[v] = bounded[v] ? best[v] : ceiling<T>(top[v] * scale);
    }
    for (int v = 0; v < kVectors; ++v) {
      T* const shift = shifts + p.row + v * kWidth;
      const Vector<T> old = load(shift), now = maximum<T>(best[v], old);
      if (all<T>(now == old)) continue;
      store(shift, now);
      if (all<T>(old == -kInfinity)) continue;  // nothing was summed
      T shrink[kWidth];
      store(shrink, exp2<T>(now == old ? Vector<T>{} : old - now));
      for (int i = 0; i < kWidth; ++i) {
        const int64_t row = p.row + v * kWidth + i;
        sums[row] *= shrink[i];
        if (kGather && shrink[i] != 1)
          for (int64_t c = 0; c < d_padded; c += kWidth)
            store(output + row * d_padded + c, load(output + row * d_padded + c) * broadcast(shrink[i]));
      }
    }
  }

  void finish() {
    for (int64_t i = 0; i < rows; ++i) {
      T factor = params.alpha;
      if (kEpilogue == Epilogue::kSoftmax) {
        part.row_max[i] = shifts[i];
        part.row_sum[i] = sums[i];
        factor = sums[i] == 0 ? T(0) : static_cast<T>(params.alpha / sums[i]);
      }
      if (!kGather) continue;
      const T* from = output + i * d_padded;
      if (part.output)  // to be merged with other parts: as it is
        write_row<T>(from, params.d, T(1), static_cast<const T*>(nullptr), false,
                     part.output + i * part.output_stride);
      else
        emit(from, part.row0 + i, factor);
    }
  }

  // A finished row goes to where it belongs.
  void emit(const T* from, int64_t position, T factor) {
    const int64_t origin = params.x.origin(position);
    const T* offset = params.offset && params.offset_row[origin] >= 0
                          ? params.offset + params.offset_row[origin] * params.d
                          : nullptr;
    if (params.output)
      write_row<T>(from, params.d, factor, offset, params.accumulate,
                   params.output + origin * params.output_stride);
    else
      write_row<In>(from, params.d, factor, offset, params.accumulate,
                    params.narrow_output + origin * params.output_stride);
  }
};

template <class In, Epilogue kEpilogue, bool kGather>
void run_pass(const SimilarityParams<In>& params, const SimilarityPart<Compute<In>>& part) {
  Pass<In, kEpilogue, kGather>(params, part).run();
}

template <class In>
void run(const SimilarityParams<In>& params, const SimilarityPart<Compute<In>>& part) {
  switch (params.epilogue) {
    case Epilogue::kSoftmax:
      return params.gathers() ? run_pass<In, Epilogue::kSoftmax, true>(params, part)
                              : run_pass<In, Epilogue::kSoftmax, false>(params, part);
    case Epilogue::kColumns:
      return run_pass<In, Epilogue::kColumns, true>(params, part);
    case Epilogue::kSymmetric:
      return run_pass<In, Epilogue::kSymmetric, true>(params, part);
    case Epilogue::kShared:
      return run_pass<In, Epilogue::kShared, true>(params, part);
  }
}

template <class In>
void sum_columns(const Rows<In>& rows, int64_t c0, int64_t c1, const int64_t* segment,
                 const Compute<In>* weight, double* sums) {
  const int64_t width = c1 - c0;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (segment[r] < 0) continue;
    const In* __restrict source = rows.row(r) + c0;
    double* __restrict sum = sums + segment[r] * width;
    const double factor = weight ? weight[r] : 1;
    for (int64_t c = 0; c < width; ++c) sum[c] += factor * to_compute(source[c]);
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

template <class In>
constexpr TypedKernels<In> kKernels = {run<In>, sum_columns<In>};

}  // namespace WSCL_ISA
}  // namespace wscl
