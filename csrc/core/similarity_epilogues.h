// What becomes of a tile's logits: pairs that do not meet are masked, the rest turn into weights and sums.
//
// A row's shift (its "maximum") is an upper bound of its logits, rounded up to an integer so that changing it
// rescales by an exact power of two. Where Cauchy-Schwarz gives a bound so low that no exponential can
// underflow, that bound is taken and no maximum is looked for; else the block's own maximum.
//
// The softmax of a column (kTwoWay) is kept lane by lane for the block. Where the bound above holds for all
// rows of the part, it is every column's shift, and the row's exponential serves the column too, times an exact
// power of two; else the column has a shift and an exponential of its own.
#pragma once

#include "simd_softplus.h"
#include "similarity_workspace.h"

namespace wscl {
namespace WSCL_ISA {

// Logits within ± this need no maximum: 2^(−2 · kSafeLogit) is far above the smallest normal number.
template <class T>
constexpr T kSafeLogit = sizeof(T) == sizeof(float) ? 48 : 400;
constexpr int kSafeRaise = 20;  // and a row's shift may lie so far above the columns' one
// Beyond ± this a shift's rounding, which a product in a multiply-add does not have, overflows exponentials.
template <class T>
constexpr T kFarShift = sizeof(T) == sizeof(float) ? 0x1p29 : 0x1p58;

template <class In, Epilogue kEpilogue, bool kGather, bool kBoth>
struct Epilogues : PartState<In, kEpilogue, kGather, kBoth> {
  using State = PartState<In, kEpilogue, kGather, kBoth>;
  using typename State::T;
  using Panel = WSCL_ISA::Panel<In>;
  using State::column_norm;
  using State::kInfinity;
  using State::kWidth;
  using State::logits;
  using State::norms;
  using State::params;
  using State::part;
  using State::shifts;
  using State::State;
  using State::sums;
  using State::weights;

  // All of the panel's logits at once, if they are not known.
  template <int kVectors>
  void whole_logits(const Panel& p) {
    if (this->known) return;
    Operands<In>::template logits<kVectors>(*this, p);
    this->known = logits;
  }

  // Whether there is a pair that does not meet, or a lane without a row that must give the columns nothing.
  bool masks(const Panel& p, int64_t lanes) const {
    if ((State::kTwoWay || kBoth) && p.live < lanes) return true;
    for (int64_t e = p.excluded; e < p.excluded_end; ++e)
      if (params.excluded[e].column >= p.c0 && params.excluded[e].column < p.c0 + p.count) return true;
    return !whole(p);
  }

  void mask(const Panel& p, int64_t lanes) {
    const T hidden = params.scale < 0 ? kInfinity : -kInfinity;  // times the scale: −∞
    for (int64_t e = p.excluded; e < p.excluded_end; ++e) {
      const int64_t k = params.excluded[e].column - p.c0;
      if (k >= 0 && k < p.count) logits[k * lanes + params.excluded[e].row - part.row0 - p.row] = hidden;
    }
    if (State::kTwoWay || kBoth)  // lanes without a row give the columns nothing
      for (int64_t k = 0; k < p.count; ++k)
        for (int64_t i = p.live; i < lanes; ++i) logits[k * lanes + i] = hidden;
    if (whole(p)) return;
    for (int64_t i = 0; i < p.live; ++i) {
      const int64_t row = part.row0 + p.row + i;
      const int64_t begin = params.begin[row] - p.c0, end = params.end[row] - p.c0;
      const auto hide = [&](int64_t from, int64_t to) {
        for (int64_t k = larger(from, 0); k < smaller(to, p.count); ++k) logits[k * lanes + i] = hidden;
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
    if constexpr (State::kTwoWay)
      weigh_two_ways<kVectors>(p);
    else if constexpr (State::kSoftmax)
      weigh_softmax<kVectors>(p);
    else if constexpr (State::kSoftplus)
      weigh_softplus<kVectors>(p);
    else
      weigh_given<kVectors>(p);
  }

 private:
  // By their ranges, every row of the panel meets every column.
  bool whole(const Panel& p) const {
    if (!params.begin) return true;
    const int64_t first = part.row0 + p.row, last = first + p.live - 1;
    return !params.outside && params.begin[last] <= p.c0 && params.end[first] >= p.c0 + p.count;
  }

  template <int kVectors, class Column>
  WSCL_INLINE void each_column(const Panel& p, const Column& column) {
    Operands<In>::template weigh<kVectors, kGather, kBoth>(*this, p, column);
  }

  template <int kVectors>
  void weigh_softmax(const Panel& p) {
    raise_shifts<kVectors>(p);
    Vector<T> shift[kVectors], sum[kVectors];
    load_shifts<kVectors>(p, shift, sum);
    const Vector<T> scale = broadcast(scale_left<kVectors>(p, is_far(shift, kVectors)));
    each_column<kVectors>(p, [&](int64_t, const T* from, Vector<T>* weight) WSCL_INLINE_LAMBDA {
      for (int v = 0; v < kVectors; ++v) weight[v] = load(from + v * kWidth) * scale - shift[v];
      exp2_all<T, kVectors>(weight);
      for (int v = 0; v < kVectors; ++v) sum[v] += weight[v];
    });
    add_lanes<kVectors>(sum, sums + p.row);
  }

  template <int kVectors>
  void weigh_two_ways(const Panel& p) {
    raise_shifts<kVectors>(p);
    const Vector<T> scale = broadcast(params.scale);
    Vector<T> shift[kVectors], sum[kVectors], factor[kVectors];
    load_shifts<kVectors>(p, shift, sum);
    T* column_shift = this->column_shifts + (p.y - this->y_rows) * kWidth;
    T* column_sum = this->column_sums + (p.y - this->y_rows) * kWidth;
    const T common = common_shift();
    const bool far_rows = is_far(shift, kVectors);
    bool one_exponential = common <= kSafeLogit<T>;
    for (int v = 0; v < kVectors; ++v) {
      one_exponential &= all<T>(shift[v] <= broadcast<T>(common + kSafeRaise));
      factor[v] = exp2<T>(shift[v] - broadcast(common));
    }
    if (one_exponential) {
      each_column<kVectors>(p, [&](int64_t k, const T* from, Vector<T>* weight) WSCL_INLINE_LAMBDA {
        Vector<T> of_column = load(column_sum + k * kWidth);
        for (int v = 0; v < kVectors; ++v) weight[v] = load(from + v * kWidth) * scale - shift[v];
        exp2_all<T, kVectors>(weight);
        for (int v = 0; v < kVectors; ++v) {
          sum[v] += weight[v];
          of_column += weight[v] * factor[v];
        }
        store(column_sum + k * kWidth, of_column);
      });
    } else {
      each_column<kVectors>(p, [&](int64_t k, const T* from, Vector<T>*) WSCL_INLINE_LAMBDA {
        // A logit is multiplied where its shift comes off, for one rounding of both as in the backward pass.
        Vector<T> value[kVectors], most = broadcast(-kInfinity), least = most;
        for (int v = 0; v < kVectors; ++v) {
          value[v] = load(from + v * kWidth);
          most = maximum<T>(value[v], most);
          least = maximum<T>(-value[v], least);  // of either, by the scale's sign
        }
        const Vector<T> top = maximum<T>(most * scale, -least * scale);
        const Vector<T> old = load(column_shift + k * kWidth), now = maximum<T>(ceiling<T>(top), old);
        const Vector<T> base = now == -kInfinity ? Vector<T>{} : now;
        const bool far = far_rows || is_far(&base, 1);
        const auto exponent = [scale, far](Vector<T> logit, Vector<T> shift) {
          if (!far) return logit * scale - shift;
          Vector<T> product = logit * scale;
          WSCL_KEEP(product);  // rounded, as the shift was
          return product - shift;
        };
        Vector<T> of_column = load(column_sum + k * kWidth) * exp2<T>(now == old ? Vector<T>{} : old - base);
        for (int v = 0; v < kVectors; ++v) {
          of_column += exp2<T>(exponent(value[v], base));
          sum[v] += exp2<T>(exponent(value[v], shift[v]));
        }
        store(column_shift + k * kWidth, now);
        store(column_sum + k * kWidth, of_column);
      });
    }
    add_lanes<kVectors>(sum, sums + p.row);
  }

  template <int kVectors>
  void weigh_softplus(const Panel& p) {
    const Vector<T> scale = broadcast(params.scale);
    Vector<T> shift[kVectors], sum[kVectors], slope[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      shift[v] = load(shifts + p.row + v * kWidth);
      sum[v] = slope[v] = Vector<T>{};
    }
    each_column<kVectors>(p, [&](int64_t, const T* from, Vector<T>* weight) WSCL_INLINE_LAMBDA {
      for (int v = 0; v < kVectors; ++v) {
        const Softplus<T> term = softplus<T>(load(from + v * kWidth) * scale + shift[v]);
        sum[v] += term.value;
        slope[v] += term.slope;
        weight[v] = term.slope;
      }
    });
    add_lanes<kVectors>(sum, sums + p.row);
    add_lanes<kVectors>(slope, this->slopes + p.row);
  }

  // Shifts and weights are known beforehand.
  template <int kVectors>
  void weigh_given(const Panel& p) {
    Vector<T> row_shift[kVectors], row_weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      row_shift[v] =
          kEpilogue == Epilogue::kSymmetric ? load(shifts + p.row + v * kWidth) : broadcast(params.shift);
      row_weight[v] = State::kRowWeights ? load(weights + p.row + v * kWidth) : Vector<T>{};
    }
    const bool far = kEpilogue != Epilogue::kSigmoid &&
                     (is_far(row_shift, kVectors) || (kEpilogue != Epilogue::kShared && has_far_column(p)));
    const Vector<T> scale = broadcast(scale_left<kVectors>(p, far));
    each_column<kVectors>(p, [&](int64_t k, const T* from, Vector<T>* weight) WSCL_INLINE_LAMBDA {
      const Vector<T> column_weight = broadcast(params.column_weight[p.c0 + k]);
      Vector<T> column_shift = {};
      if (kEpilogue != Epilogue::kShared) column_shift = broadcast(params.column_shift[p.c0 + k]);
      if constexpr (kEpilogue == Epilogue::kSigmoid) {
        for (int v = 0; v < kVectors; ++v)
          weight[v] = column_weight * softplus<T>(load(from + v * kWidth) * scale + column_shift).slope;
        return;
      }
      constexpr bool kOfColumn = kEpilogue == Epilogue::kColumns;
      Vector<T> power[kVectors], of_column[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> logit = load(from + v * kWidth) * scale;
        power[v] = logit - (kOfColumn ? column_shift : row_shift[v]);
        of_column[v] = logit - column_shift;
      }
      exp2_all<T, kVectors>(power);
      if (kEpilogue == Epilogue::kSymmetric) exp2_all<T, kVectors>(of_column);
      for (int v = 0; v < kVectors; ++v) {
        if (kOfColumn)
          weight[v] = column_weight * power[v];
        else if (kEpilogue == Epilogue::kShared)
          weight[v] = (row_weight[v] + column_weight) * power[v];
        else
          weight[v] = row_weight[v] * power[v] + column_weight * of_column[v];
      }
    });
  }

  static bool is_far(const Vector<T>* shift, int count) {
    const Vector<T> far = broadcast(kFarShift<T>);
    typename Simd<T>::Bits near = far == far;
    for (int v = 0; v < count; ++v) near &= (shift[v] <= far) & (shift[v] >= -far);
    return !all<T>(near);
  }

  bool has_far_column(const Panel& p) const {
    const T* const shift = params.column_shift + p.c0;
    bool far = false;
    int64_t k = 0;
    for (; k + kWidth <= p.count; k += kWidth) {
      const Vector<T> several = load(shift + k);
      far |= is_far(&several, 1);
    }
    for (; k < p.count; ++k) far |= !(shift[k] <= kFarShift<T> && shift[k] >= -kFarShift<T>);
    return far;
  }

  // Where a shift is far, the logits become their products with the scale, rounded as the shift was; returns
  // what is left to multiply by.
  template <int kVectors>
  T scale_left(const Panel& p, bool far) {
    if (__builtin_expect(!far, 1)) return params.scale;
    whole_logits<kVectors>(p);
    const Vector<T> scale = broadcast(params.scale);
    for (int64_t at = 0; at < p.count * kVectors * kWidth; at += kWidth)
      store(logits + at, load(this->known + at) * scale);
    this->known = logits;
    return 1;
  }

  template <int kVectors>
  void load_shifts(const Panel& p, Vector<T>* shift, Vector<T>* sum) {
    for (int v = 0; v < kVectors; ++v) {
      shift[v] = load(shifts + p.row + v * kWidth);
      shift[v] = shift[v] == -kInfinity ? Vector<T>{} : shift[v];
      sum[v] = Vector<T>{};
    }
  }

  template <int kVectors>
  static void add_lanes(const Vector<T>* from, double* to) {
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kWidth; ++i) to[v * kWidth + i] += from[v][i];
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
      whole_logits<kVectors>(p);
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
      const Vector<T> shrink = exp2<T>(now == old ? Vector<T>{} : old - now);
      for (int i = 0; i < kWidth; ++i) sums[p.row + v * kWidth + i] *= shrink[i];
      if constexpr (kGather) Operands<In>::template scale_rows<kVectors>(*this, p, v, shrink);
    }
  }

 protected:
  // The bound of all logits of this part's rows and the block.
  T common_shift() const {
    return ceiling<T>(broadcast<T>(params.scale * column_norm * T(1.0001) * this->row_norm))[0];
  }

  void start_columns(int64_t count) {
    const T common = common_shift();
    const Vector<T> shift = broadcast(common <= kSafeLogit<T> ? common : -kInfinity);
    for (int64_t at = 0; at < count * kWidth; at += kWidth) {
      store(this->column_shifts + at, shift);
      store(this->column_sums + at, Vector<T>{});
    }
  }

  // The block's lanes are merged, and join what is known of its columns.
  void finish_columns(int64_t c0, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      const Vector<T> shift = load(this->column_shifts + k * kWidth);
      const T top = horizontal_max<T>(shift);
      if (top == -kInfinity) continue;
      const Vector<T> part = load(this->column_sums + k * kWidth);
      const double sum = horizontal_sum<T>(part * exp2<T>(shift - broadcast(top)));
      if (sum == 0) continue;  // no one met it
      double &known_max = params.column_max[c0 + k], &known_sum = params.column_sum[c0 + k];
      const double now = known_max > top ? known_max : top;
      known_sum = known_max == now ? known_sum : known_sum * __builtin_exp2(known_max - now);
      known_sum += top == now ? sum : sum * __builtin_exp2(top - now);
      known_max = now;
    }
  }
};

}  // namespace WSCL_ISA
}  // namespace wscl
