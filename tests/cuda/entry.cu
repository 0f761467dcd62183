// What the tests call through ctypes.
#include "core/infonce_cuda.h"
#include "core/similarity_cuda.h"

using namespace wscl::cuda;

extern "C" int wscl_similarity(const SimilarityParams* params, void* stream) {
  return run_similarity(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_infonce_forward(const InfoNCEProblem* problem, InfoNCEForward* outputs, void* stream) {
  return infonce_forward(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_infonce_backward(const InfoNCEProblem* problem, InfoNCEBackward* outputs, void* stream) {
  return infonce_backward(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

// The sizes of the structs, which ctypes has to agree with.
extern "C" int wscl_size(int which) {
  const int sizes[] = {sizeof(SimilarityParams), sizeof(InfoNCEProblem), sizeof(InfoNCEForward),
                       sizeof(InfoNCEBackward)};
  return sizes[which];
}
