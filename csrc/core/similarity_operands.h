// Which operands a pass over rows of In multiplies, and its three products with them.
//
// `pass` is the part's state (similarity_workspace.h), `p` a panel of x and the rows of y that it meets.
#pragma once

#include "similarity_panels.h"
#if defined(WSCL_BFLOAT16_TILES)
#include "similarity_amx.h"
#elif defined(WSCL_BFLOAT16_DOT)
#include "similarity_dot.h"
#endif

namespace wscl {
namespace WSCL_ISA {

template <bool kFirst, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

#if defined(WSCL_BFLOAT16_DOT)
template <class In>
constexpr bool kPairs = Is<In, BFloat16>::value;
template <class In>
using Math = typename Choose<kPairs<In>, Pairs, Numbers<Compute<In>>>::Type;
#else
template <class In>
constexpr bool kPairs = false;
template <class In>
using Math = Numbers<Compute<In>>;
#endif

template <class In>
using Element = typename Math<In>::Element;  // of y's rows, as the first product reads them
template <class In>
using Packed = typename Math<In>::Step;  // of packed rows of x

// Vectors by multiply-adds of numbers.
template <class In>
struct ByNumbers {
  using Math = WSCL_ISA::Math<In>;
  struct InUse {};  // what a thread holds while it multiplies
  // Rows of y that are read, and columns' sums that are written, at a time.
  static constexpr int64_t kWhole = 1;

  template <int kVectors, class Pass, class Panel>
  static void logits(Pass& pass, const Panel& p) {
    logits_panel<Math, kVectors>(p.y, p.count, pass.x_packed + p.row * pass.depth, pass.depth, pass.logits,
                                 pass.ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_columns(Pass& pass, const Panel& p, Aheads& ahead) {
    scatter_panel<Math, kVectors>(pass.logits, RowList<Packed<In>>{pass.x_rows + p.row}, p.count, p.live,
                                  pass.d_padded, pass.sums_of_columns(p), ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_rows(Pass& pass, const Panel& p) {
    gather_panel<Math, kVectors>(pass.logits, RowList<Packed<In>>{p.y}, p.count, pass.d_padded,
                                 pass.sums_of_rows(p));
  }

  // Of a block, as pairs.
  static int64_t pair_rows(int64_t block) {
    return (block + 1) / 2;
  }
  // What the panel's v-th vector of rows has gathered, times `factor`.
  template <int kVectors, class Pass, class Panel, class T = Compute<In>>
  static void scale_rows(Pass& pass, const Panel& p, int v, Vector<T> factor) {
    constexpr int kWidth = Simd<T>::kWidth;
    for (int i = 0; i < kWidth; ++i) {
      T* const row = pass.sums_of_rows(p) + (v * kWidth + i) * pass.d_padded;
      for (int64_t c = 0; factor[i] != 1 && c < pass.d_padded; c += kWidth)
        store(row + c, load(row + c) * broadcast<T>(factor[i]));
    }
  }
  // What the i-th row of the part has gathered.
  template <class Pass>
  static auto sums_of_row(const Pass& pass, int64_t i) {
    return pass.output + i * pass.d_padded;
  }
};

#if defined(WSCL_BFLOAT16_DOT)
// Vectors by dot instructions on pairs.
template <class In>
struct ByPairs : ByNumbers<In> {
  static constexpr int64_t kLanes = 16;

  template <int kVectors, class Pass, class Panel>
  static void to_columns(Pass& pass, const Panel& p, Aheads& ahead) {
    pair_lanes(pass.logits, p.count, kVectors * kLanes, pass.weight_pairs);
    scatter_panel<Pairs, kVectors>(pass.weight_pairs, pass.pairs_of_rows(p), p.count, (p.live + 1) / 2,
                                   pass.d_padded, pass.sums_of_columns(p), ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_rows(Pass& pass, const Panel& p) {
    pair_weights(pass.logits, p.count, kVectors * kLanes);
    gather_panel<Pairs, kVectors>(reinterpret_cast<const Pair2*>(pass.logits), pass.pairs_of_columns(p),
                                  (p.count + 1) / 2, pass.d_padded, pass.sums_of_rows(p));
  }
};
#endif

#if defined(WSCL_BFLOAT16_TILES)
template <class In>
struct ByTiles {
  using InUse = Tiles;
  static constexpr int64_t kWhole = kTileRows;

  template <int kVectors, class Pass, class Panel>
  static void logits(Pass& pass, const Panel& p) {
    logits_by_tiles<kVectors>(p.y[0], pass.y_bytes, p.count, pass.x_packed + p.row * pass.depth, pass.depth,
                              pass.logits, pass.ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_columns(Pass& pass, const Panel& p, Aheads& ahead) {
    rows_of_weights<kVectors>(pass.logits, p.count, pass.weight_pairs);
    scatter_by_tiles(pass.weight_pairs, pass.pairs_of_rows(p).data, p.count, pass.d_padded,
                     pass.sums_of_columns(p), ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_rows(Pass& pass, const Panel& p) {
    pairs_of_weights<kVectors>(pass.logits, p.count);
    gather_by_tiles<kVectors>(reinterpret_cast<const Pair2*>(pass.logits),
                              pass.y_pairs + (p.y - pass.y_rows) / 2, p.count, pass.d_padded,
                              pass.sums_of_rows(p));
  }

  static int64_t pair_rows(int64_t) {
    return kPairStride;
  }
  template <int kVectors, class Pass, class Panel>
  static void scale_rows(Pass& pass, const Panel& p, int v, Vector<float> factor) {
    constexpr int64_t kLanes = kVectors * kTileRows;
    float* const sums = pass.sums_of_rows(p) + v * kTileRows;
    for (int64_t c = 0; c < pass.d_padded; ++c) store(sums + c * kLanes, load(sums + c * kLanes) * factor);
  }
  template <class Pass>
  static const float* sums_of_row(const Pass& pass, int64_t i) {
    const int64_t first = i - i % kPanel<float>;
    const int64_t lanes = smaller(round_up(pass.rows - first, kTileRows), kPanel<float>);
    const float* const sums = pass.output + first * pass.d_padded + i - first;
    for (int64_t c = 0; c < pass.d_padded; ++c) pass.scratch[c] = sums[c * lanes];
    return pass.scratch;
  }
};
template <class In>
constexpr bool kTiles = kPairs<In>;
template <class In>
using Operands = typename Choose<kPairs<In>, ByTiles<In>, ByNumbers<In>>::Type;
#elif defined(WSCL_BFLOAT16_DOT)
template <class In>
constexpr bool kTiles = false;
template <class In>
using Operands = typename Choose<kPairs<In>, ByPairs<In>, ByNumbers<In>>::Type;
#else
template <class In>
constexpr bool kTiles = false;
template <class In>
using Operands = ByNumbers<In>;
#endif

}  // namespace WSCL_ISA
}  // namespace wscl
