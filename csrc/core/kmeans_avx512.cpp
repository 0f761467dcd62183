#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512)
#define WSCL_ISA avx512
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 12
#include "kmeans_typed.h"

namespace wscl {
const KMeansKernels kKMeansAvx512 = {"avx512", avx512::kmeans_typed<avx512::FullOperands<float>>(),
                                     avx512::kmeans_typed<avx512::FullOperands<double>>()};
}  // namespace wscl

WSCL_TARGET_END
