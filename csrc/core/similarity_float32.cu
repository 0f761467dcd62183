#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float32(const SimilarityParams& p, cudaStream_t stream) {
  return run_float<3>(p, stream);
}

}  // namespace wscl::cuda
