#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "similarity.h"
#include "tags.h"
#include "target.h"

WSCL_TARGET(WSCL_TARGET_AVX512)
#define WSCL_ISA avx512
#define WSCL_VECTOR_BYTES 64
#include "tags_kernel.h"

namespace wscl {
const TagKernels kTagsAvx512 = avx512::tag_kernels();
}  // namespace wscl

WSCL_TARGET_END
