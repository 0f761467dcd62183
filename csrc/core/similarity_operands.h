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
  static constexpr int64_t kWhole =
      1;  // rows of y that are read, and columns' sums that are written, at a time

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
};

#if defined(WSCL_BFLOAT16_DOT)
// Vectors by dot instructions on pairs.
template <class In>
struct ByPairs {
  static constexpr int64_t kLanes = 16;
  struct InUse {};
  static constexpr int64_t kWhole = 1;

  template <int kVectors, class Pass, class Panel>
  static void logits(Pass& pass, const Panel& p) {
    ByNumbers<In>::template logits<kVectors>(pass, p);
  }
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
    tiles_of_weights<kVectors>(pass.logits, p.count, pass.weight_pairs);
    gather_by_tiles<kVectors>(pass.weight_pairs, pass.pairs_of_columns(p).data, p.count, pass.d_padded,
                              pass.sums_of_rows(p));
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
