#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float32_fast(const SimilarityParams& p, cudaStream_t stream) {
  if (p.d <= 64) return launch_epilogue<FloatTiling<2, 64>>(p, stream);
  if (p.d <= 128) return launch_epilogue<FloatTiling<2, 128>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace wscl::cuda
