// The similarity pass for one tiling alone, which compiles in seconds: for builds that leave something out
// (mutations.py).
#include "core/similarity_launch.cuh"

using namespace wscl::cuda;

#ifdef WSCL_FLOAT32
using Tiles = FloatTiling<3, 64>;
#else
using Tiles = HalfTiling<BFloat16, 64>;
#endif

extern "C" int wscl_pass(const SimilarityParams* params, void* stream) {
  return launch_epilogue<Tiles>(*params, static_cast<cudaStream_t>(stream));
}
