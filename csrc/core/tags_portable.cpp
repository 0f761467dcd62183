#include <cstdint>
#include <cstring>

#include "similarity.h"
#include "tags.h"

#define WSCL_ISA portable
#define WSCL_VECTOR_BYTES 16
#include "tags_kernel.h"

namespace wscl {
const TagKernels kTagsPortable = portable::tag_kernels();
}  // namespace wscl
