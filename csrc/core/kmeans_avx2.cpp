#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX2)
#define WSCL_ISA avx2
#define WSCL_VECTOR_BYTES 32
#define WSCL_ROW_TILE 6
#include "kmeans_typed.h"

namespace wscl {
const KMeansKernels kKMeansAvx2 = {"avx2", avx2::kmeans_typed<avx2::FullOperands<float>>(),
                                   avx2::kmeans_typed<avx2::FullOperands<double>>()};
}  // namespace wscl

WSCL_TARGET_END
