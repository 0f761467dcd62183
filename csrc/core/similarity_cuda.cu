#include "similarity_cuda.h"

#include <algorithm>

#include "similarity_launch.cuh"

namespace wscl::cuda {

int choose_splits(const SimilarityParams& p, bool output) {
  constexpr int64_t kTile = 64, kTiles = 4, kMostBytes = 64 << 20;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return 1;
  const int64_t row_blocks = std::max<int64_t>(1, blocks_of(p));
  const int64_t columns = p.triangular ? p.y.count / 2 : p.y.count;
  const int64_t bytes = output ? p.x.count * padded_width(p.d) * 4 : 0;
  const int64_t most = std::min<int64_t>(columns / (kTile * kTiles), bytes ? kMostBytes / bytes : INT_MAX);
  // Time in passes of one part over all columns. A part begins with loads of the rows, 100 columns' worth; its
  // output is written and read again, 8 bytes of memory for 4 multiply-adds a column: 300 columns on an A100,
  // 385 on an H100, a sixth of that in float32.
  const double part = 100 + (!output ? 0 : element_size(p.precision) == 2 ? 300 : 50);
  const int64_t room = processors * (element_size(p.precision) == 2 && p.d <= 128 ? 2 : 1);
  int best = 1;
  double least = 1e300;
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min<int64_t>(most, 4 * room)); ++splits) {
    const double waves = static_cast<double>((row_blocks * splits + room - 1) / room);
    const double time = waves / splits * (1 + splits * part / std::max<int64_t>(1, columns));
    if (time < least) {
      least = time;
      best = static_cast<int>(splits);
    }
  }
  return best;
}

cudaError_t run_similarity(const SimilarityParams& params, cudaStream_t stream) {
  switch (params.precision) {
    case Precision::kBFloat16:
      return run_bfloat16(params, stream);
    case Precision::kFloat16:
      return run_float16(params, stream);
    case Precision::kFloat32:
      return run_float32(params, stream);
    case Precision::kFloat32Fast:
      return run_float32_fast(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace wscl::cuda
