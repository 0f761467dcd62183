// Rows of k-means' product rounded to bfloat16, two numbers a step (included by kmeans_<isa>.cpp).
#pragma once

#include "kmeans_pass.h"
#include "kmeans_simd.h"

namespace wscl {
namespace WSCL_ISA {

struct Bfloat16Rows {
  using Number = float;
  using Element = uint16_t;
  static constexpr bool kRounds = true;
  static constexpr int kStep = 2;

  static WSCL_INLINE Element round(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<Element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
  static WSCL_INLINE Vector<float> write(Element* out, Vector<float> values) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)values);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    return (Vector<float>)(__builtin_convertvector((Narrow)rounded, Simd<float>::Bits) << 16);
  }
};

}  // namespace WSCL_ISA
}  // namespace wscl
