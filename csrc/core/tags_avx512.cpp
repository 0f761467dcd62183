#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "similarity.h"
#include "tags.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")
#define WSCL_ISA avx512
#define WSCL_VECTOR_BYTES 64
#include "tags_kernel.h"

namespace wscl {
const TagKernels kTagsAvx512 = avx512::tag_kernels();
}  // namespace wscl
