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
//       C[block][d]      += third product, W times the panel's rows of x, where columns gather too
//
// Where weights are kept, each panel of each block has a place of its own for them. Tiles of AMX make a panel's
// logits some columns at a time, and the epilogue follows them (similarity_operands.h).
//
// Memory traffic: x, y and the output once a chunk; S never leaves L1. The cost beside the products is the
// epilogue, about 10 vector operations for kWidth pairs against d multiply-adds.
#pragma once

#include "similarity_epilogues.h"
#include "similarity_kept.h"

namespace wscl {
namespace WSCL_ISA {

template <class In>
void add_row(const In* __restrict row, int64_t d, double factor, double* __restrict sum) {
  for (int64_t c = 0; c < d; ++c) sum[c] += factor * to_compute(row[c]);
}

template <class In>
void sum_columns(const Rows<In>& rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const int64_t* segment,
                 const Compute<In>* weight, double* sums) {
  const int64_t width = c1 - c0;
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t origin = rows.origin(r);
    if (segment[origin] < 0) continue;
    with_type(rows.kind, rows.row(r), [&](const auto* row) {
      add_row(row + c0, width, weight ? weight[origin] : 1, sums + segment[origin] * width);
    });
  }
}

template <class In, Epilogue kEpilogue, bool kGather, bool kBoth>
struct Pass : Epilogues<In, kEpilogue, kGather, kBoth> {
  using Base = Epilogues<In, kEpilogue, kGather, kBoth>;
  using Base::Base;
  using Base::d_padded;
  using Base::kInfinity;
  using Base::kWidth;
  using Base::logits;
  using Base::output;
  using Base::params;
  using Base::part;
  using Base::rows;
  using Base::shifts;
  using Base::sums;
  using Base::x_rows;
  using Base::y_rows;
  using typename Base::Element;
  using typename Base::Packed;
  using Math = WSCL_ISA::Math<In>;
  using typename Base::Panel;
  using typename Base::T;
  // Where asked to: weights for kKept, logits for the backward pass, which finds them.
  static constexpr bool kKeepsWeights = kEpilogue == Epilogue::kSoftmax && kGather && !kPairs<In>;
  static constexpr bool kKeepsLogits = kEpilogue == Epilogue::kTwoWay, kFindsLogits = kBoth;

  const char* next_place = nullptr;
  int64_t first_column = 0;

  void run() {
    [[maybe_unused]] const typename Operands<In>::InUse in_use;
    prepare_rows();
    int64_t column0 = part.column0, column1 = part.column1;
    if (params.begin && !params.outside && rows > 0) {
      column0 = larger(column0, params.begin[part.row0]);
      column1 = smaller(column1, params.end[part.row1 - 1]);
    }
    first_column = column0;
    for (int64_t c = column0; c < column1; c += this->block) {
      const int64_t next = c + this->block;
      if (next < column1) fetch_ahead(next, smaller(this->block, column1 - next));
      stream_block(c, smaller(this->block, column1 - c));
    }
    finish();
  }

  void prepare_rows() {
    for (int64_t r = 0, live; r < rows; r += live) {
      live = panel_rows<T>(rows, r);
      const int vectors = static_cast<int>((live + kWidth - 1) / kWidth);
      pack_panel(params.x, part.row0 + r, live, vectors, params.d, this->depth, this->scratch,
                 this->x_packed + r * this->depth, this->norms + r);
    }
    const int64_t padded = round_up(rows, kWidth);
    if (kGather)
      for (int64_t i = 0; i < padded * d_padded; ++i) output[i] = 0;
    for (int64_t i = 0; i < padded; ++i) {
      const bool live = i < rows;
      this->norms[i] = std::sqrt(this->norms[i] + vanished<T>(params.d));
      if (!(this->norms[i] <= this->row_norm)) this->row_norm = this->norms[i];
      sums[i] = 0;
      if (Base::kSoftplus) this->slopes[i] = 0;
      if (Base::kSoftmax) shifts[i] = -kInfinity;
      if (Base::kRowShifts) shifts[i] = live ? params.row_shift[part.row0 + i] : 0;
      if (Base::kRowWeights) this->weights[i] = live ? params.row_weight[part.row0 + i] : 0;
    }
    if constexpr (kBoth) prepare_columns();
  }

  // Rows of x as the columns' product reads them.
  void prepare_columns() {
    for (int64_t i = 0; i < rows; ++i) {
      const In* row = params.x.row(part.row0 + i);
      x_rows[i] = reinterpret_cast<const Element*>(row);
      if constexpr (!kPairs<In>) {
        if (this->x_in_place) continue;
        widen(params.x, row, this->x_copy + i * d_padded);
        x_rows[i] = this->x_copy + i * d_padded;
      }
    }
    if constexpr (kPairs<In>) {
      interleave_rows(x_rows, rows, params.d, d_padded, this->x_pairs);
      for (int64_t at = (rows + 1) / 2 * d_padded; at < this->x_pair_rows() * d_padded; ++at)
        this->x_pairs[at] = 0;
    }
  }

  void widen(const Rows<In>& rows, const In* row, T* to) const {
    with_type(rows.kind, row, [&](const auto* from) { widen_row(from, params.d, d_padded, to); });
  }

  // The tiles of the block at hand share the lines of the next one among them.
  void fetch_ahead(int64_t c0, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      this->next_rows[k] = reinterpret_cast<const char*>(params.y.row(c0 + k));
    this->ahead.read = {this->next_rows, count, params.d * number_bytes(params.y)};
    const int64_t lines = count * (this->ahead.read.bytes / Ahead::kLine + 1);
    const int64_t times = (rows + kPanel<T> - 1) / kPanel<T> * looks();
    this->ahead.read.lines = (lines + times - 1) / larger(1, times);
  }

  // Lists the block's rows of y, and copies them where they are not read in place.
  void list_columns(int64_t c0, int64_t count) {
    const bool whole = !kTiles<In> || c0 + count + kKeys <= params.y.count;
    const bool copied = !this->in_place || !whole;
    if constexpr (kTiles<In>) this->y_bytes = (copied ? d_padded : params.y.stride) * int64_t(sizeof(In));
    for (int64_t k = 0; k < count + kKeys; ++k) {
      const In* row = params.y.row(c0 + smaller(k, count - 1));
      if (!copied) {
        y_rows[k] = reinterpret_cast<const Element*>(row);
        continue;
      }
      Element* const copy = this->y_copy + smaller(k, count - 1) * d_padded;
      y_rows[k] = copy;
      if (k >= count) continue;
      if constexpr (kPairs<In>) {
        std::memcpy(copy, row, params.d * sizeof(In));
        std::memset(static_cast<void*>(copy + params.d), 0, (d_padded - params.d) * sizeof(In));
      } else {
        widen(params.y, row, copy);
      }
    }
  }

  void stream_block(int64_t c0, int64_t count) {
    list_columns(c0, count);
    if constexpr (kTiles<In> && kGather)
      transpose_rows(y_rows, count, params.d, d_padded, Operands<In>::pair_rows(this->block), this->y_pairs);
    else if constexpr (kPairs<In> && kGather)
      interleave_rows(y_rows, count, params.d, d_padded, this->y_pairs);
    const auto sum_up = [&](int64_t first, int64_t last) {
      if (part.segment_sums)
        sum_columns<In>(params.y, larger(c0 + first, part.sums_begin), smaller(c0 + last, part.sums_end), 0,
                        params.d, params.column_segment, nullptr, part.segment_sums);
    };
    if constexpr (Base::kSoftmax)
      this->column_norm = largest_norm<Math>(y_rows, count, params.d, sum_up);
    else
      sum_up(0, count);
    if constexpr (Base::kTwoWay) this->start_columns(count);
    if constexpr (kBoth)
      for (int64_t i = 0; i < count * d_padded; ++i) this->column_output[i] = 0;

    int64_t excluded = this->first_excluded;
    for (int64_t r = 0, live; r < rows; r += live) {
      live = panel_rows<T>(rows, r);
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
      // Whole pairs, and whole tiles where logits are kept; what a row does not meet is masked.
      if (kPairs<In>) k0 -= k0 % 2;
      if (part.logits) k0 -= k0 % kKeys;
      const Panel panel = {r, live, c0 + k0, k1 - k0, y_rows + k0, excluded_before, excluded};
      if (live > 2 * kWidth)
        meet<kMostVectors>(panel);
      else if (live > kWidth)
        meet<2>(panel);
      else
        meet<1>(panel);
    }
    if constexpr (Base::kTwoWay) this->finish_columns(c0, count);
    if constexpr (kBoth)
      for (int64_t k = 0; k < count; ++k)
        write_row<T>(this->column_output + k * d_padded, params.d, params.alpha, static_cast<const T*>(nullptr),
                     true, params.column_output + params.y.origin(c0 + k) * params.column_output_stride);
  }

  template <int kVectors>
  void meet(const Panel& p) {
    constexpr int64_t kLanes = kVectors * kWidth;
    if (kFindsLogits && part.logits) {
      this->known = place(part.logits, p, kLanes);
      ask_for_next<kLanes>(this->ahead.read, this->known, scatter_tiles<T>(this->block, d_padded));
    } else {
      if (kKeepsWeights && part.kept.weights) logits = place(part.kept.weights, p, kLanes);
      if (kKeepsLogits && part.logits) logits = place(part.logits, p, kLanes);
      if (part.kept.weights || part.logits) ask_for_next<kLanes>(this->ahead.write, logits, looks());
      this->known = nullptr;
      if (!Operands<In>::kMakesAsItWeighs || this->masks(p, kLanes)) {
        this->template whole_logits<kVectors>(p);
        this->mask(p, kLanes);
      }
    }
    this->template weigh<kVectors>(p);
    if (kKeepsWeights && part.kept.weights) std::memcpy(kept_shifts(p), shifts + p.row, kLanes * sizeof(T));
    if constexpr (kBoth)
      Operands<In>::template to_columns<kVectors>(*this, p,
                                                  kFindsLogits && part.logits ? this->ahead : this->nothing);
    if constexpr (kGather) Operands<In>::template to_rows<kVectors>(*this, p);
  }

  // Where a panel's weights or logits are kept, from the first column on that it can meet.
  T* place(T* kept, const Panel& p, int64_t lanes) const {
    const int64_t k0 = p.y - y_rows, before = p.c0 - k0 - first_column;
    return kept + before * round_up(rows, kWidth) + p.row * this->block + k0 * lanes;
  }

  // The next panel's place is on its way, a part of it `times` times.
  template <int64_t kLanes>
  void ask_for_next(Ahead& ahead, const T* here, int64_t times) {
    next_place = reinterpret_cast<const char*>(here + kLanes * this->block);
    ahead = {&next_place, 1, kLanes * this->block * int64_t(sizeof(T))};
    ahead.lines = ahead.bytes / Ahead::kLine / larger(1, times) + 1;
  }

  // How often a panel looks ahead while it meets a block.
  int64_t looks() const {
    return Operands<In>::looks(this->block, this->depth);
  }

  T* kept_shifts(const Panel& p) const {
    return part.kept.shifts + (p.c0 - first_column) / this->block * round_up(rows, kWidth) + p.row;
  }

  void finish() {
    for (int64_t i = 0; i < rows; ++i) {
      T factor = params.alpha;
      if (Base::kSoftmax || Base::kSoftplus) {
        part.row_max[i] = Base::kSoftplus ? this->slopes[i] : shifts[i];
        part.row_sum[i] = sums[i];
      }
      if (Base::kSoftmax) factor = sums[i] == 0 ? T(0) : static_cast<T>(params.alpha / sums[i]);
      if (!kGather) continue;
      const T* from = Operands<In>::sums_of_row(*this, i);
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
      with_type(params.x.kind, params.narrow_output, [&](auto* to) {
        write_row(from, params.d, factor, offset, params.accumulate, to + origin * params.output_stride);
      });
  }
};

template <Epilogue kEpilogue, bool kGather, bool kBoth = false, class In>
void run_pass(const SimilarityParams<In>& params, const SimilarityPart<Compute<In>>& part) {
  Pass<In, kEpilogue, kGather, kBoth>(params, part).run();
}

template <class In>
void run_epilogue(const SimilarityParams<In>& params, const SimilarityPart<Compute<In>>& part) {
  const bool gathers = params.gathers(), both = params.column_output;
  switch (params.epilogue) {
    case Epilogue::kSoftmax:
      return gathers ? run_pass<Epilogue::kSoftmax, true>(params, part)
                     : run_pass<Epilogue::kSoftmax, false>(params, part);
    case Epilogue::kColumns:
      return run_pass<Epilogue::kColumns, true>(params, part);
    case Epilogue::kSymmetric:
      return both ? run_pass<Epilogue::kSymmetric, true, true>(params, part)
                  : run_pass<Epilogue::kSymmetric, true>(params, part);
    case Epilogue::kShared:
      return both ? run_pass<Epilogue::kShared, true, true>(params, part)
                  : run_pass<Epilogue::kShared, true>(params, part);
    case Epilogue::kTwoWay:
      return run_pass<Epilogue::kTwoWay, false>(params, part);
    case Epilogue::kSoftplus:
      return gathers ? run_pass<Epilogue::kSoftplus, true>(params, part)
                     : run_pass<Epilogue::kSoftplus, false>(params, part);
    case Epilogue::kSigmoid:
      return run_pass<Epilogue::kSigmoid, true>(params, part);
    case Epilogue::kKept:
      return;  // a KeptPass
  }
}

// What is computed with in float shares one pass, which is a third of the code to compile.
template <class In>
constexpr bool kAsAnyFloat = Is<Compute<In>, float>::value && !kPairs<In>;

template <class In>
Rows<AnyFloat> of_any(const Rows<In>& rows) {
  return {reinterpret_cast<const AnyFloat*>(rows.data), rows.stride * int64_t(sizeof(In)), rows.index,
          rows.count,
          Is<In, float>::value      ? FloatKind::kFloat
          : Is<In, BFloat16>::value ? FloatKind::kBFloat16
                                    : FloatKind::kFloat16};
}

template <class In>
void run(const SimilarityParams<In>& params, const SimilarityPart<Compute<In>>& part) {
  if constexpr (Is<In, Compute<In>>::value)
    if (params.epilogue == Epilogue::kKept) return KeptPass<In>(params, part).run();
  if constexpr (kAsAnyFloat<In>) {
    const SimilarityNumbers<float>& numbers = params;
    const SimilarityParams<AnyFloat> of_any_float = {numbers, of_any(params.x), of_any(params.y),
                                                     reinterpret_cast<AnyFloat*>(params.narrow_output)};
    run_epilogue(of_any_float, part);
  } else {
    run_epilogue(params, part);
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
