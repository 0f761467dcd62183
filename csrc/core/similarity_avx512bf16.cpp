#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512_BFLOAT16)
#define WSCL_ISA avx512bf16
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 12
#define WSCL_KEY_TILE 8
#define WSCL_BFLOAT16_DOT 1
#include "similarity_kernel.h"

namespace wscl {
const BFloat16Kernels kSimilarityAvx512Bf16 = {avx512bf16::kKernels<BFloat16>, avx512bf16::bfloat16_dot};
}  // namespace wscl

WSCL_TARGET_END
