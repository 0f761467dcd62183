#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512)
#define WSCL_ISA avx512
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 12
#define WSCL_KEY_TILE 8
#include "similarity_kernel.h"

namespace wscl {
const SimilarityKernels kSimilarityAvx512 = {"avx512",
                                             avx512::multiply_add,
                                             avx512::kKernels<float>,
                                             avx512::kKernels<double>,
                                             avx512::kKernels<BFloat16>,
                                             avx512::kKernels<Float16>};
}  // namespace wscl

WSCL_TARGET_END
