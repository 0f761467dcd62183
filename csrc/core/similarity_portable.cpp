#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "similarity.h"

#define WSCL_ISA portable
#define WSCL_VECTOR_BYTES 16
#define WSCL_ROW_TILE 6
#define WSCL_KEY_TILE 4
#include "similarity_kernel.h"

namespace wscl {
const SimilarityKernels kSimilarityPortable = {"portable",
                                               portable::multiply_add,
                                               portable::kKernels<float>,
                                               portable::kKernels<double>,
                                               portable::kKernels<BFloat16>,
                                               portable::kKernels<Float16>};
}  // namespace wscl
