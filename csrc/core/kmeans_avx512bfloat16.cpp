#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512_BFLOAT16)
#define WSCL_ISA avx512bfloat16
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 12
#include "kmeans_typed.h"

namespace wscl {
namespace avx512bfloat16 {

// Operands rounded to bfloat16: two of them meet in each lane of one instruction, twice the speed.
struct Bfloat16Operands {
  using Number = float;
  using Element = uint16_t;
  using Columns = __m512bh;
  static constexpr bool kRounds = true;
  static constexpr int kStep = 2;

  static WSCL_INLINE Columns columns(const Element* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static WSCL_INLINE Vector<float> multiply_add(Vector<float> sum, const Element* row, Columns columns) {
    int32_t pair;
    std::memcpy(&pair, row, sizeof(pair));
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), columns);
  }
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

}  // namespace avx512bfloat16

const KMeansTyped<float> kKMeansAvx512Bfloat16 =
    avx512bfloat16::kmeans_typed<avx512bfloat16::Bfloat16Operands>();

}  // namespace wscl

WSCL_TARGET_END
