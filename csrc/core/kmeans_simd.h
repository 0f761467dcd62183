// What k-means needs of vectors beside simd.h.
#pragma once

#include <cmath>

#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

// Numbers below the normal range are numbers while this lives, whatever the caller's thread makes of them
// (torch.set_flush_denormal): a column's number in a score of zero must not be flushed.
class KeepsSubnormals {
 public:
  KeepsSubnormals() : before_(read()) {
    write(before_ & ~kFlush);
  }
  ~KeepsSubnormals() {
    write(before_);
  }
  KeepsSubnormals(const KeepsSubnormals&) = delete;
  KeepsSubnormals& operator=(const KeepsSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // FTZ and DAZ
  static WSCL_INLINE uint64_t read() {
    return _mm_getcsr();
  }
  static WSCL_INLINE void write(uint64_t control) {
    _mm_setcsr(static_cast<uint32_t>(control));
  }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1u << 24;  // FZ
  static WSCL_INLINE uint64_t read() {
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static WSCL_INLINE void write(uint64_t control) {
    asm volatile("msr fpcr, %0" : : "r"(control));
  }
#else
  static constexpr uint64_t kFlush = 0;
  static WSCL_INLINE uint64_t read() {
    return 0;
  }
  static WSCL_INLINE void write(uint64_t) {}
#endif
  uint64_t before_;
};

// The smaller of the two; b where either is NaN.
template <class T>
WSCL_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm512_min_ps((__m512)a, (__m512)b);
  else
    return (Vector<T>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif WSCL_X86_BYTES == 32
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Vector<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// maximum() of simd.h, whose test for the instruction set a target pragma does not answer.
template <class T>
WSCL_INLINE Vector<T> larger_of(Vector<T> a, Vector<T> b) {
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (Vector<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif WSCL_X86_BYTES == 32
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
WSCL_INLINE Vector<T> square_root(Vector<T> a) {
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm512_sqrt_ps((__m512)a);
  else
    return (Vector<T>)_mm512_sqrt_pd((__m512d)a);
#elif WSCL_X86_BYTES == 32
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm256_sqrt_ps((__m256)a);
  else
    return (Vector<T>)_mm256_sqrt_pd((__m256d)a);
#else
  for (int i = 0; i < Simd<T>::kWidth; ++i) a[i] = std::sqrt(a[i]);
  return a;
#endif
}

// `value` with the bits of `mask` replaced by those of `bits`, which has no others.
template <class T>
WSCL_INLINE Vector<T> with_bits(Vector<T> value, typename Simd<T>::Bits mask, typename Simd<T>::Bits bits) {
#if WSCL_X86_BYTES == 64
  return (Vector<T>)_mm512_ternarylogic_epi32((__m512i)value, (__m512i)mask, (__m512i)bits, 0xba);
#else
  return (Vector<T>)(((typename Simd<T>::Bits)value & ~mask) | bits);
#endif
}

// What at_least() gives where it holds in every lane.
template <class T>
constexpr uint32_t kAllLanes = (uint64_t(1) << Simd<T>::kWidth) - 1;

// Lanes in which a ≥ b, as bits.
template <class T>
WSCL_INLINE uint32_t at_least(Vector<T> a, Vector<T> b) {
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ);
#elif WSCL_X86_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
  else
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Simd<T>::kWidth; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
  return bits;
#endif
}

// `count` numbers from p on, zero beyond.
template <class T>
WSCL_INLINE Vector<T> load_part(const T* p, int64_t count) {
  if (count >= Simd<T>::kWidth) return load(p);
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float))
    return (Vector<T>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
  else
    return (Vector<T>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
#else
  T part[Simd<T>::kWidth] = {};
  for (int64_t e = 0; e < count; ++e) part[e] = p[e];
  return load(part);
#endif
}

// Lane l of the result is the (l % kCount)-th number from p on.
template <class T, int kCount>
WSCL_INLINE Vector<T> repeat(const void* p) {
  if constexpr (kCount * sizeof(T) == sizeof(int64_t)) {
    int64_t numbers;
    std::memcpy(&numbers, p, sizeof(numbers));
    return (Vector<T>)(typename Simd<double>::Bits{} + numbers);
  }
#if WSCL_X86_BYTES == 64
  if constexpr (kCount * sizeof(T) == 16)
    return (Vector<T>)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif WSCL_X86_BYTES == 32
  if constexpr (kCount * sizeof(T) == 16)
    return (Vector<T>)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#endif
  T numbers[Simd<T>::kWidth];
  for (int l = 0; l < Simd<T>::kWidth; ++l)
    std::memcpy(numbers + l, static_cast<const char*>(p) + l % kCount * sizeof(T), sizeof(T));
  return load(numbers);
}

template <int kWidth, int kCount>  // every kCount-th lane of a, then the first of b
struct EveryOf {
  static constexpr int lane(int i) {
    return i < kWidth / kCount ? i * kCount : kWidth;
  }
};

// Lane l of the result is the sum of the l-th kCount lanes, as far as there are any; 0 beyond.
template <class T, int kCount>
WSCL_INLINE Vector<T> sums_of_neighbours(Vector<T> v) {
  constexpr int kWidth = Simd<T>::kWidth;
  v += shuffle<T>(v, v, Rotate<kWidth, 1>());
  if constexpr (kCount == 4) v += shuffle<T>(v, v, Rotate<kWidth, 2>());
  return shuffle<T>(v, Vector<T>{}, EveryOf<kWidth, kCount>());
}

template <class T>
struct Sum {
  static WSCL_INLINE Vector<T> of(Vector<T> a, Vector<T> b) {
    return a + b;
  }
};
template <class T>
struct Largest {
  static WSCL_INLINE Vector<T> of(Vector<T> a, Vector<T> b) {
    return larger_of<T>(a, b);
  }
};

// Lane i of the result is what Combine makes of all lanes of rows[i], which are used up.
template <class T, class Combine, int kCount = Simd<T>::kWidth>
WSCL_INLINE Vector<T> fold(Vector<T>* rows) {
  if constexpr (kCount == 1) {
    return rows[0];
  } else {
    constexpr int kWidth = Simd<T>::kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      const Vector<T> a = rows[i], b = rows[i + kCount / 2];
      rows[i] =
          Combine::of(shuffle<T>(a, b, Interleave<kWidth, 0>()), shuffle<T>(a, b, Interleave<kWidth, 1>()));
    }
    return fold<T, Combine, kCount / 2>(rows);
  }
}

// Lane i of the result is the sum of rows[i]'s lanes.
template <class T>
WSCL_INLINE Vector<T> sums_of(Vector<T>* rows) {
  return fold<T, Sum<T>>(rows);
}

// Lane i of the result is the largest of rows[i]'s lanes.
template <class T>
WSCL_INLINE Vector<T> largest_of(Vector<T>* rows) {
  return fold<T, Largest<T>>(rows);
}

// Lane i of *best and *second become the two largest of all lanes of best[i] and second[i], which are used up.
template <class T, int kCount = Simd<T>::kWidth>
WSCL_INLINE void fold_best_two(Vector<T>* best, Vector<T>* second) {
  if constexpr (kCount > 1) {
    constexpr int kWidth = Simd<T>::kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      const Vector<T> a = best[i], b = best[i + kCount / 2], c = second[i], d = second[i + kCount / 2];
      const Vector<T> low = shuffle<T>(a, b, Interleave<kWidth, 0>()),
                      high = shuffle<T>(a, b, Interleave<kWidth, 1>());
      best[i] = larger_of<T>(low, high);
      second[i] = larger_of<T>(minimum<T>(low, high), larger_of<T>(shuffle<T>(c, d, Interleave<kWidth, 0>()),
                                                                   shuffle<T>(c, d, Interleave<kWidth, 1>())));
    }
    fold_best_two<T, kCount / 2>(best, second);
  }
}

// A vector of doubles from as many numbers of T.
template <class T>
WSCL_INLINE Vector<double> widen(const T* p) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return load(p);
  } else {
    typedef T Half __attribute__((vector_size(WSCL_VECTOR_BYTES / 2)));
    Half half;
    std::memcpy(&half, p, sizeof(half));
    return __builtin_convertvector(half, Vector<double>);
  }
}

template <class T>
WSCL_INLINE Vector<double> widen_part(const T* p, int64_t count) {
  if (count >= Simd<double>::kWidth) return widen(p);
  Vector<double> part = {};
  for (int64_t e = 0; e < count; ++e) part[e] = p[e];
  return part;
}

}  // namespace WSCL_ISA
}  // namespace wscl
