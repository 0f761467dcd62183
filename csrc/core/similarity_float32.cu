#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float32(const SimilarityParams& p, cudaStream_t stream) {
  if (p.d <= 64) return launch_epilogue<FloatTiling<3, 64>>(p, stream);
  if (p.d <= 128) return launch_epilogue<FloatTiling<3, 128>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace wscl::cuda
