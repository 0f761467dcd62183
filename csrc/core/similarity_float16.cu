#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float16(const SimilarityParams& p, cudaStream_t stream) {
  return run_half<Float16>(p, stream);
}

}  // namespace wscl::cuda
