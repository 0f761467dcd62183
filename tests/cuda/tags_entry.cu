// What the tests of tags_cuda.h call through ctypes.
#include "core/tags_cuda.h"

using namespace wscl::cuda;

extern "C" int wscl_tag_weighted_sum(const TagProblem* problem, TagSums* outputs, void* stream) {
  return tag_weighted_sum(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_tags_size(int which) {
  return which ? sizeof(TagSums) : sizeof(TagProblem);
}
