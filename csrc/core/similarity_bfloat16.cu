#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_bfloat16(const SimilarityParams& p, cudaStream_t stream) {
  return run_half<BFloat16>(p, stream);
}

}  // namespace wscl::cuda
