#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define WSCL_ISA avx512
#define WSCL_VECTOR_BYTES 64
#define WSCL_ROW_TILE 12
#include "kmeans_kernel.h"

namespace wscl {
const KMeansKernels kKMeansAvx512 = {"avx512", avx512::kmeans_typed<avx512::FullOperands<float>>(),
                                     avx512::kmeans_typed<avx512::FullOperands<double>>()};
}  // namespace wscl
