#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kmeans_pass.h"
#include "similarity.h"

#define WSCL_ISA portable
#define WSCL_VECTOR_BYTES 16
#define WSCL_ROW_TILE 6
#include "kmeans_typed.h"

namespace wscl {
const KMeansKernels kKMeansPortable = {"portable", portable::kmeans_typed<portable::FullOperands<float>>(),
                                       portable::kmeans_typed<portable::FullOperands<double>>()};
}  // namespace wscl
