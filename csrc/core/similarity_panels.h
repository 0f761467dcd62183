// How the operands of the similarity pass's products lie, for one instruction set.
//
// Rows x come in panels of up to kPanel, one to a vector lane, packed once: [d][vectors · kWidth]. Rows y are
// read where they are, through a list of pointers: a lane never waits for a transposition, and any order of
// rows costs the same. The similarities of a block of y's rows to a panel lie as [row of y][vectors · kWidth],
// so that everything that belongs to a row of x (shift, sum, maximum) is one lane of a register.
#pragma once

#include "dtypes.h"
#include "similarity_products.h"

namespace wscl {
namespace WSCL_ISA {

// Calls with a row of its own type: which it is is asked here and nowhere else.
template <class In, class Call>
WSCL_INLINE void with_type(FloatKind, const In* row, const Call& call) {
  call(row);
}
template <class In, class Call>
WSCL_INLINE void with_type(FloatKind, In* row, const Call& call) {
  call(row);
}
template <class Call>
WSCL_INLINE void with_type(FloatKind kind, const AnyFloat* row, const Call& call) {
  if (kind == FloatKind::kFloat)
    call(reinterpret_cast<const float*>(row));
  else if (kind == FloatKind::kBFloat16)
    call(reinterpret_cast<const BFloat16*>(row));
  else
    call(reinterpret_cast<const Float16*>(row));
}
template <class Call>
WSCL_INLINE void with_type(FloatKind kind, AnyFloat* row, const Call& call) {
  if (kind == FloatKind::kFloat)
    call(reinterpret_cast<float*>(row));
  else if (kind == FloatKind::kBFloat16)
    call(reinterpret_cast<BFloat16*>(row));
  else
    call(reinterpret_cast<Float16*>(row));
}

// Bytes of a number of the rows.
template <class In>
int64_t number_bytes(const Rows<In>& rows) {
  if (!Is<In, AnyFloat>::value) return sizeof(In);
  return rows.kind == FloatKind::kFloat ? sizeof(float) : sizeof(BFloat16);
}

// One row, widened, zero from d to `padded`.
template <class In, class T>
void widen_row(const In* from, int64_t d, int64_t padded, T* to) {
  constexpr int kWidth = Simd<T>::kWidth;
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) store(to + c, load_wide<In>(from + c));
  for (; c < d; ++c) to[c] = to_compute(from[c]);
  for (; c < padded; ++c) to[c] = 0;
}

// to[c] (+)= factor · from[c] (+ offset[c]), narrowed.
template <class In, class T>
void write_row(const T* from, int64_t d, T factor, const T* offset, bool accumulate, In* to) {
  constexpr int kWidth = Simd<T>::kWidth;
  const Vector<T> factors = broadcast(factor);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    Vector<T> value = load(from + c) * factors;
    if (offset) value += load(offset + c);
    if (accumulate) value += load_wide<In>(to + c);
    store_narrow(to + c, value);
  }
  for (; c < d; ++c) {
    T value = from[c] * factor;
    if (offset) value += offset[c];
    if (accumulate) value += to_compute(to[c]);
    from_compute(value, to + c);
  }
}

// Rows [first, first + count) as [steps][vectors · kWidth], of d steps, zero beyond count; `row` holds kWidth
// rows of d padded to kWidth. Squared norms go to norms[vectors · kWidth].
template <class In, class T>
void pack_panel(const Rows<In>& rows, int64_t first, int64_t count, int vectors, int64_t d, int64_t steps,
                T* row, T* out, T* norms) {
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t padded = round_up(d, kWidth);
  for (int v = 0; v < vectors; ++v) {
    for (int r = 0; r < kWidth; ++r) {
      const int64_t position = v * kWidth + r;
      if (position < count)
        with_type(rows.kind, rows.row(first + position),
                  [&](const auto* from) { widen_row(from, d, padded, row + r * padded); });
      else
        for (int64_t c = 0; c < padded; ++c) row[r * padded + c] = 0;
    }
    Vector<T> norm = {};
    for (int64_t p = 0; p < d; p += kWidth) {
      Vector<T> square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) square[r] = load(row + r * padded + p);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int e = 0; e < kWidth; ++e) {
        if (p + e >= steps) break;
        norm += square[e] * square[e];
        store(out + ((p + e) * vectors + v) * kWidth, square[e]);
      }
    }
    store(norms + v * kWidth, norm);
  }
}

// What may be missing in a sum of d squares, since those below the normal range vanish, at the latest in a dot
// instruction.
template <class T>
T vanished(int64_t d) {
  return T(d) * T(sizeof(T) == sizeof(float) ? 0x1p-126 : 0x1p-1022);
}

// The largest norm of `count` rows of d, with what rounding adds to it; NaN or ∞ where a row has one. A few
// rows at a time, which are in L1 when `then(first, last)` is called of them.
template <class Math, class Then, class T = typename Math::T>
T largest_norm(const typename Math::Element* const* rows, int64_t count, int64_t d, const Then& then) {
  constexpr int kWidth = Simd<T>::kWidth, kReach = kWidth * Math::kNumbers, kSums = 4;
  Vector<T> largest = {}, spoilt = {};
  for (int64_t first = 0; first < count; first += kWidth) {
    Vector<T> sums[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const typename Math::Element* row = rows[smaller(first + r, count - 1)];
      const auto add_square = [row](Vector<T> sum, int64_t c) {
        return Math::add(sum, Math::lanes(row + c), Math::lanes(row + c));
      };
      Vector<T> part[kSums] = {};  // several, since each waits for its last addition
      int64_t c = 0;
      for (; c + kSums * kReach <= d; c += kSums * kReach)
        for (int i = 0; i < kSums; ++i) part[i] = add_square(part[i], c + i * kReach);
      for (; c + kReach <= d; c += kReach) part[0] = add_square(part[0], c);
      Vector<T> sum = (part[0] + part[1]) + (part[2] + part[3]);
      for (int e = 0; c < d; ++c, e = (e + 1) % kWidth) sum[e] += to_compute(row[c]) * to_compute(row[c]);
      sums[r] = sum;
    }
    transpose<T>(sums);
    Vector<T> norm = {};
    for (int r = 0; r < kWidth; ++r) norm += sums[r];
    largest = maximum<T>(norm, largest);
    spoilt += norm - norm;  // NaN from then on
    then(first, smaller(first + kWidth, count));
  }
  return std::sqrt(horizontal_max<T>(largest) + vanished<T>(d)) + horizontal_sum<T>(spoilt);
}

}  // namespace WSCL_ISA
}  // namespace wscl
