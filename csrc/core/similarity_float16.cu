#include "similarity_launch.cuh"

namespace wscl::cuda {

cudaError_t run_float16(const SimilarityParams& p, cudaStream_t stream) {
  if (p.d <= 64) return launch_epilogue<HalfTiling<Float16, 64>>(p, stream);
  if (p.d <= 128) return launch_epilogue<HalfTiling<Float16, 128>>(p, stream);
  if (p.d <= 256) return launch_epilogue<HalfTiling<Float16, 256>>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace wscl::cuda
