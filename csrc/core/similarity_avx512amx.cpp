#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512_BFLOAT16)
#define WSCL_ISA avx512amx
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 16
#define WSCL_KEY_TILE 16
#define WSCL_BFLOAT16_DOT 1
#define WSCL_BFLOAT16_TILES 1
#include "similarity_kernel.h"

namespace wscl {
const BFloat16Kernels kSimilarityAvx512Amx = {avx512amx::kKernels<BFloat16>, avx512amx::tile_multiplications};
}  // namespace wscl

WSCL_TARGET_END
