#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX2)
#define WSCL_ISA avx2
#define WSCL_VECTOR_BYTES 32
#define WSCL_ROW_TILE 6
#define WSCL_KEY_TILE 4
#include "similarity_kernel.h"

namespace wscl {
const SimilarityKernels kSimilarityAvx2 = {"avx2",
                                           avx2::multiply_add,
                                           avx2::kKernels<float>,
                                           avx2::kKernels<double>,
                                           avx2::kKernels<BFloat16>,
                                           avx2::kKernels<Float16>};
}  // namespace wscl

WSCL_TARGET_END
