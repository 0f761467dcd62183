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
  static constexpr int64_t kBlockBytes = 192 * 1024;  // of a block; and the weights of 128 columns take 24 KiB
  // Whether logits become weights while others are made.
  static constexpr bool kMakesAsItWeighs = false;

  // Rows of y in a block, the same for all passes where columns get results: what one keeps another finds.
  static constexpr int64_t kMostColumns = kBlock;
  static int64_t block_rows(int64_t d, bool) {
    const int64_t fit = kBlockBytes / larger(1, d * int64_t(sizeof(Compute<In>)));
    return smaller(kMostColumns, larger(kLeastBlock, fit / kKeys * kKeys));
  }
  // How often a panel looks ahead while it meets a block.
  static int64_t looks(int64_t block, int64_t depth) {
    return block / kKeys * ((depth + kStretch - 1) / kStretch);
  }

  template <int kVectors, class Pass, class Panel>
  static void logits(Pass& pass, const Panel& p) {
    logits_panel<Math, kVectors>(p.y, p.count, pass.x_packed + p.row * pass.depth, pass.depth, pass.logits,
                                 pass.ahead);
  }
  // Logits become weights, column by column: `column(k, logits, weight)` makes the k-th one's.
  template <int kVectors, bool kGather, bool kBoth, class Pass, class Panel, class Column>
  static WSCL_INLINE void weigh(Pass& pass, const Panel& p, const Column& column) {
    constexpr int kWidth = Simd<Compute<In>>::kWidth;
    for (int64_t k = 0; k < p.count; ++k) {
      const int64_t at = k * kVectors * kWidth;
      Vector<Compute<In>> weight[kVectors];
      column(k, pass.known + at, weight);
      if (kGather)
        for (int v = 0; v < kVectors; ++v) store(pass.logits + at + v * kWidth, weight[v]);
    }
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
  static constexpr int64_t kBlockBytes = 256 * 1024;  // of a block, and as much of its transpose
  static constexpr int64_t kGroup = 2 * kTileRows;    // rows of y that are multiplied at a time
  static constexpr bool kMakesAsItWeighs = true;

  // What rows gather is loaded and stored once a block, but what columns gather lies in L2 as well.
  static constexpr int64_t kMostColumns = 2 * kBlock;
  static int64_t block_rows(int64_t d, bool to_columns) {
    const int64_t fit = kBlockBytes / larger(1, d * int64_t(sizeof(In)));
    return smaller(to_columns ? kBlock : kMostColumns, larger(kLeastBlock, fit / kGroup * kGroup));
  }
  static int64_t looks(int64_t block, int64_t depth) {
    return block / kGroup * (depth / kTilePairs);
  }

  template <int kVectors, class Pass, class Panel>
  static void logits(Pass& pass, const Panel& p) {
    for (int64_t k = 0; k < p.count; k += kGroup)
      multiply<kVectors>(pass, p, k, pass.logits + k * kVectors * kTileRows, [] {});
  }
  // Logits that are not known come from the tiles group by group, and a group becomes weights while the next
  // one is multiplied: tiles and vectors work side by side.
  template <int kVectors, bool kGather, bool kBoth, class Pass, class Panel, class Column>
  static WSCL_INLINE void weigh(Pass& pass, const Panel& p, const Column& column) {
    constexpr int64_t kLanes = kVectors * kTileRows;
    const PairedWeights<kVectors> to = {kGather ? pass.gather_pairs : nullptr,
                                        kBoth ? pass.weight_pairs : nullptr};
    const float* const logits = pass.known ? pass.known : pass.logits;
    // Where none are kept, there is room for two groups: these stay in L1.
    const int64_t wrap = pass.known || pass.part.logits ? -1 : 2 * kGroup - 1;
    const int64_t steps = pass.depth / kTilePairs;
    const int64_t share = (kGroup / 2 + steps - 1) / steps * 2;  // columns a step
    int64_t made = pass.known ? p.count : 0, weighed = 0;
    const auto weigh_until = [&](int64_t end) WSCL_INLINE_LAMBDA {
      for (; weighed < end; weighed += 2) {
        const float* const from = logits + (weighed & wrap) * kLanes;
        Vector<float> even[kVectors], odd[kVectors] = {};
        column(weighed, from, even);
        if (weighed + 1 < p.count) column(weighed + 1, from + kLanes, odd);
        if (kGather) to.store_pairs(weighed, even, odd);
        if (kBoth) to.store_rows(weighed, even), to.store_rows(weighed + 1, odd);
      }
    };
    do {
      const int64_t next = smaller(made + kGroup, p.count);
      if (made < next)
        multiply<kVectors>(pass, p, made, pass.logits + (made & wrap) * kLanes,
                           [&]() WSCL_INLINE_LAMBDA { weigh_until(smaller(made, weighed + share)); });
      weigh_until(made);
      made = next;
    } while (weighed < p.count);
    to.finish(p.count);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_columns(Pass& pass, const Panel& p, Aheads& ahead) {
    scatter_by_tiles(pass.weight_pairs, pass.pairs_of_rows(p).data, p.count, pass.d_padded,
                     pass.sums_of_columns(p), ahead);
  }
  template <int kVectors, class Pass, class Panel>
  static void to_rows(Pass& pass, const Panel& p) {
    gather_by_tiles<kVectors>(pass.gather_pairs, pass.y_pairs + (p.y - pass.y_rows) / 2, pair_rows(pass.block),
                              p.count, pass.d_padded, pass.sums_of_rows(p));
  }

  // How far apart the rows of a block's transpose lie, with spare pairs for a tile: an odd number of cache
  // lines, so that neighbouring rows share no set of the cache.
  static int64_t pair_rows(int64_t block) {
    return ((block / 2 / kTilePairs + 1) | 1) * kTilePairs;
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

 private:
  // The logits of the group of columns that begins with the k-th; `meanwhile` is called once a step.
  template <int kVectors, class Pass, class Panel, class Meanwhile>
  static WSCL_INLINE void multiply(Pass& pass, const Panel& p, int64_t k, float* out,
                                   const Meanwhile& meanwhile) {
    const char* const y = reinterpret_cast<const char*>(p.y[0]) + k * pass.y_bytes;
    const Pair2* const x = pass.x_packed + p.row * pass.depth;
    if (p.count - k <= kTileRows)
      return logits_by_tiles<kVectors, false>(y, pass.y_bytes, x, pass.depth, out, [&] { pass.ahead.fetch(); });
    logits_by_tiles<kVectors, true>(y, pass.y_bytes, x, pass.depth, out, [&]() WSCL_INLINE_LAMBDA {
      pass.ahead.fetch();
      meanwhile();
    });
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
