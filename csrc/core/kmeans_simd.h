// What k-means needs of vectors beside simd.h.
#pragma once

#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

// The smaller of the two; b where either is NaN.
template <class T>
WSCL_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
  return a < b ? a : b;
}

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

// Lane i of the result is the sum of rows[i]'s lanes.
template <class T>
WSCL_INLINE Vector<T> sums_of(Vector<T>* rows) {
  transpose<T>(rows);
  Vector<T> sum = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < Simd<T>::kWidth; ++i) sum += rows[i];
  return sum;
}

// Lane i of the result is the largest of rows[i]'s lanes.
template <class T>
WSCL_INLINE Vector<T> largest_of(Vector<T>* rows) {
  transpose<T>(rows);
  Vector<T> largest = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < Simd<T>::kWidth; ++i) largest = maximum<T>(largest, rows[i]);
  return largest;
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
