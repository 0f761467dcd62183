#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "similarity.h"
#include "tags.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX2)
#define WSCL_ISA avx2
#define WSCL_VECTOR_BYTES 32
#include "tags_kernel.h"

namespace wscl {
const TagKernels kTagsAvx2 = avx2::tag_kernels();
}  // namespace wscl

WSCL_TARGET_END
