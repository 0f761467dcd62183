// Vectors of T in the compiler's own vector extension, and the exponential the kernels need.
//
// Included once per instruction set, inside a translation unit that has set the target and defined
// WSCL_ISA (a namespace of its own, so that the linker never merges code of two instruction sets) and
// WSCL_VECTOR_BYTES. No function of the standard library may be instantiated from here on.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define WSCL_INLINE inline __attribute__((always_inline))

namespace wscl {
namespace WSCL_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kWidth = WSCL_VECTOR_BYTES / sizeof(float);
  typedef float Vector __attribute__((vector_size(WSCL_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(WSCL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(WSCL_VECTOR_BYTES)));
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127.f;
  static constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer
  // 2^f on [−½, ½], relative error 2e-9 before rounding (Lawson's iteration, constant term held at 1)
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree + 1] = {
      1.f,           0.6931472028550972f, 0.24022647913627762f,  0.05550332471040427f,
      0.0096184373f, 0.0013398874f,       0.00015353362007890114f};
};

template <>
struct Simd<double> {
  static constexpr int kWidth = WSCL_VECTOR_BYTES / sizeof(double);
  typedef double Vector __attribute__((vector_size(WSCL_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(WSCL_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(WSCL_VECTOR_BYTES)));
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023.;
  static constexpr double kRound = 6755399441055744.;  // 1.5 · 2^52
  // 2^f on [−½, ½], relative error 7e-18 before rounding (Remez)
  static constexpr int kDegree = 11;
  static constexpr double kCoefficients[kDegree + 1] = {
      1.,
      0.69314718055994533046,
      0.24022650695910156204,
      0.055504108664819921605,
      0.0096181291075883352443,
      0.0013333558146789921722,
      0.00015403530462504632,
      0.000015252733489988525649,
      1.321543308967639918e-6,
      1.0178198021671930844e-7,
      7.0741056135081427963e-9,
      4.4352827069572771511e-10};
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
WSCL_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};  // not 0 + value: −0 stays −0
}

template <class T>
WSCL_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
WSCL_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// Both keep a NaN that stands in their first argument.
template <class V>
WSCL_INLINE V maximum(V a, V b) {
  return a < b ? b : a;
}

template <class T>
WSCL_INLINE T horizontal_max(Vector<T> v) {
  T result = v[0];
  for (int i = 1; i < Simd<T>::kWidth; ++i) result = result < v[i] || v[i] != v[i] ? v[i] : result;
  return result;
}

template <class T>
WSCL_INLINE T horizontal_sum(Vector<T> v) {
  T part[Simd<T>::kWidth];
  std::memcpy(part, &v, sizeof(part));
  for (int half = Simd<T>::kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// 2^x for x ≤ about 20; exactly 0 from the bottom of the normal range down, NaN for NaN.
// The exponent is put together in the low bits of a sum whose ulp is 1, so that no conversion is needed.
template <class T>
WSCL_INLINE Vector<T> exp2(Vector<T> x) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  x = maximum(x, broadcast<T>(-S::kBias));
  const Vector<T> shift = broadcast<T>(S::kRound + S::kBias);
  const Vector<T> rounded = x + shift;
  const Vector<T> f = x - (rounded - shift);
  Vector<T> p = broadcast<T>(S::kCoefficients[S::kDegree]);
#pragma GCC unroll 12
  for (int k = S::kDegree - 1; k >= 0; --k) p = p * f + broadcast<T>(S::kCoefficients[k]);
  return p * (Vector<T>)((Bits)rounded << S::kMantissa);
}

}  // namespace WSCL_ISA
}  // namespace wscl
