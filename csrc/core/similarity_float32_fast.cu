#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float32_fast(const SimilarityParams& p, cudaStream_t stream) {
  return run_float<2>(p, stream);
}

}  // namespace wscl::cuda
