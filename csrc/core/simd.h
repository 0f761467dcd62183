// Vectors of T in the compiler's own vector extension, and the exponential the kernels need.
//
// Included once per instruction set, inside a translation unit that has set the target and defined
// WSCL_ISA (a namespace of its own, so that the linker never merges code of two instruction sets) and
// WSCL_VECTOR_BYTES. No function of the standard library may be instantiated from here on.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

// What the translation unit may use of x86: no macro of the compiler's says it after a target pragma.
#if defined(__x86_64__)
#include <immintrin.h>
#define WSCL_X86_BYTES WSCL_VECTOR_BYTES
#else
#define WSCL_X86_BYTES 0
#endif

#define WSCL_INLINE inline __attribute__((always_inline))
#define WSCL_INLINE_LAMBDA __attribute__((always_inline))

// Makes the compiler believe that a vector changed.
#if defined(__x86_64__)
#define WSCL_KEEP(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define WSCL_KEEP(vector) asm volatile("" : "+w"(vector))
#else
#define WSCL_KEEP(vector) asm volatile("" : "+m"(vector))
#endif

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
  typedef uint32_t Words __attribute__((vector_size(WSCL_VECTOR_BYTES)));
  typedef uint16_t Halves __attribute__((vector_size(WSCL_VECTOR_BYTES / 2)));
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127.f;
  static constexpr float kRound = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer
  // 2^f on [−½, ½], relative error 2e-9 before rounding (Lawson's iteration, constant term held at 1)
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree + 1] = {
      1.f,           0.6931472028550972f, 0.24022647913627762f,   0.05550332471040427f,
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
  static constexpr double kCoefficients[kDegree + 1] = {1.,
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

template <class A, class B>
struct Is {
  static constexpr bool value = false;
};
template <class A>
struct Is<A, A> {
  static constexpr bool value = true;
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

// One vector of a row of halves, widened.
template <class In>
WSCL_INLINE auto load_wide(const In* p) {
  using T = Compute<In>;
  constexpr int kWidth = Simd<T>::kWidth;
  if constexpr (sizeof(In) == sizeof(T)) {
    return load(p);
  } else {
#if WSCL_X86_BYTES == 64
    if constexpr (Is<In, Float16>::value && kWidth == 16)
      return (Vector<T>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif WSCL_X86_BYTES == 32
    if constexpr (Is<In, Float16>::value && kWidth == 8)
      return (Vector<T>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    if constexpr (Is<In, BFloat16>::value) {
      typename Simd<T>::Halves halves;
      std::memcpy(&halves, p, sizeof halves);
      return (Vector<T>)(__builtin_convertvector(halves, typename Simd<T>::Words) << 16);
    }
    Vector<T> wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = to_compute(p[i]);
    return wide;
  }
}

template <class In>
WSCL_INLINE void store_narrow(In* p, Vector<Compute<In>> v) {
  using T = Compute<In>;
  if constexpr (sizeof(In) == sizeof(T)) {
    store(p, v);
  } else {
#if WSCL_X86_BYTES == 64
    if constexpr (Is<In, Float16>::value && Simd<T>::kWidth == 16)
      return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#elif WSCL_X86_BYTES == 32
    if constexpr (Is<In, Float16>::value && Simd<T>::kWidth == 8)
      return _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#endif
    if constexpr (Is<In, BFloat16>::value) {
      using Words = typename Simd<T>::Words;
      Words bits = (Words)v;
      bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      bits = v == v ? bits : Words{} + 0x7fc0;
      const typename Simd<T>::Halves halves = __builtin_convertvector(bits, typename Simd<T>::Halves);
      std::memcpy(p, &halves, sizeof halves);
      return;
    }
    for (int i = 0; i < Simd<T>::kWidth; ++i) from_compute(v[i], p + i);
  }
}

// The larger of the two; b where either is NaN. One instruction, which compilers do not find by themselves.
template <class T>
WSCL_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(Vector<T>) == 64) {
    if constexpr (sizeof(T) == 4)
      return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
    else
      return (Vector<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
  }
#elif WSCL_X86_BYTES == 32
  if constexpr (sizeof(Vector<T>) == 32) {
    if constexpr (sizeof(T) == 4)
      return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
    else
      return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#endif
  return a > b ? a : b;
}

template <int... kIndices>
struct Indices {};
template <int kCount, int... kIndices>
struct Count : Count<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct Count<0, kIndices...> {
  using Type = Indices<kIndices...>;
};

// Lane i of the result is lane select(i) of a and b laid side by side.
template <class T, class Select, int... i>
WSCL_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, Select, Indices<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Select::lane(i)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::Bits{Select::lane(i)...});
#endif
}

template <class T, class Select>
WSCL_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, Select select) {
  return shuffle<T>(a, b, select, typename Count<Simd<T>::kWidth>::Type());
}

template <int kWidth, int kHalf>  // 0: the first halves of a and b, lane by lane; 1: the second halves
struct Interleave {
  static constexpr int lane(int i) {
    return i % 2 * kWidth + i / 2 + kHalf * kWidth / 2;
  }
};

template <int kWidth, int kBy>
struct Rotate {
  static constexpr int lane(int i) {
    return (i + kBy) % kWidth;
  }
};

template <class T, int kBy = Simd<T>::kWidth / 2>
WSCL_INLINE T horizontal_sum(Vector<T> v) {
  v += shuffle<T>(v, v, Rotate<Simd<T>::kWidth, kBy>());
  if constexpr (kBy > 1)
    return horizontal_sum<T, kBy / 2>(v);
  else
    return v[0];
}

template <class T, int kBy = Simd<T>::kWidth / 2>
WSCL_INLINE T horizontal_max(Vector<T> v) {
  v = maximum<T>(v, shuffle<T>(v, v, Rotate<Simd<T>::kWidth, kBy>()));
  if constexpr (kBy > 1)
    return horizontal_max<T, kBy / 2>(v);
  else
    return v[0];
}

// rows[i][j] becomes rows[j][i]: as many perfect shuffles as the width has bits.
template <class T, int kStage = Simd<T>::kWidth>
WSCL_INLINE void transpose(Vector<T>* rows) {
  constexpr int kWidth = Simd<T>::kWidth;
  if constexpr (kStage > 1) {
    Vector<T> next[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = shuffle<T>(rows[i], rows[i + kWidth / 2], Interleave<kWidth, 0>());
      next[2 * i + 1] = shuffle<T>(rows[i], rows[i + kWidth / 2], Interleave<kWidth, 1>());
    }
    transpose<T, kStage / 2>(next);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// The smallest integer not below x, or about so where x is so large that every number is an integer.
template <class T>
WSCL_INLINE Vector<T> ceiling(Vector<T> x) {
  const Vector<T> round = broadcast<T>(Simd<T>::kRound), most = broadcast<T>(Simd<T>::kRound / 4);
  const Vector<T> up = (x + broadcast<T>(0.5)) + round - round;
  return x < most && x > -most ? up : x;
}

// Whether every lane of a comparison's result is true.
template <class T>
WSCL_INLINE bool all(typename Simd<T>::Bits truth) {
  auto every = truth[0];
  for (int i = 1; i < Simd<T>::kWidth; ++i) every &= truth[i];
  return every != 0;
}

// 2^f of several vectors side by side, so that none waits for the last step of another.
template <class T, int kCount>
WSCL_INLINE void exp2_polynomial(const Vector<T>* f, Vector<T>* power) {
  using S = Simd<T>;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) power[i] = broadcast<T>(S::kCoefficients[S::kDegree]);
#pragma GCC unroll 12
  for (int k = S::kDegree - 1; k >= 0; --k)
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) power[i] = power[i] * f[i] + broadcast<T>(S::kCoefficients[k]);
}

// 2^x for x ≤ about 20, in place; 0 from the bottom of the normal range down (of AVX-512: of the subnormal
// range), NaN for NaN. Without AVX-512's instructions for it, the exponent is put together in the low bits of a
// sum whose ulp is 1, so that no conversion is needed.
template <class T, int kCount>
WSCL_INLINE void exp2_all(Vector<T>* x) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  Vector<T> f[kCount], power[kCount];
#if WSCL_X86_BYTES == 64
  if constexpr (sizeof(Vector<T>) == 64 && sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) f[i] = (Vector<T>)_mm512_reduce_ps((__m512)x[i], 0);
    exp2_polynomial<T, kCount>(f, power);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)
      x[i] = (Vector<T>)_mm512_scalef_ps((__m512)power[i], (__m512)(x[i] - f[i]));
    return;
  }
#endif
  const Vector<T> shift = broadcast<T>(S::kRound + S::kBias);
  Vector<T> rounded[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const Vector<T> least = maximum<T>(broadcast<T>(-S::kBias), x[i]);
    rounded[i] = least + shift;
    f[i] = least - (rounded[i] - shift);
  }
  exp2_polynomial<T, kCount>(f, power);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] = power[i] * (Vector<T>)((Bits)rounded[i] << S::kMantissa);
}

template <class T>
WSCL_INLINE Vector<T> exp2(Vector<T> x) {
  exp2_all<T, 1>(&x);
  return x;
}

}  // namespace WSCL_ISA
}  // namespace wscl
