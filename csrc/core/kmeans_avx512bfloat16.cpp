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
#include "kmeans_bfloat16.h"
#include "kmeans_typed.h"

namespace wscl {
namespace avx512bfloat16 {

// Two numbers meet in each lane of one instruction, at twice the speed where the processor has two such units.
struct Bfloat16Operands : Bfloat16Rows {
  using Columns = __m512bh;
  static constexpr int kStretch = kStep, kMostTerms = 4;
  struct InUse {};

  static WSCL_INLINE Columns columns(const Element* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static WSCL_INLINE Vector<float> multiply_add(Vector<float> sum, const Element* row, Columns columns) {
    int32_t pair;
    std::memcpy(&pair, row, sizeof(pair));
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), columns);
  }
  template <int kTerms>
  static WSCL_INLINE Vector<float> multiply_add_terms(Vector<float> sum, const Element* row, Columns columns) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)repeat<float, kTerms>(row), columns);
  }
};

}  // namespace avx512bfloat16

const KMeansTyped<float> kKMeansAvx512Bfloat16 =
    avx512bfloat16::kmeans_typed<avx512bfloat16::Bfloat16Operands>();

}  // namespace wscl

WSCL_TARGET_END
