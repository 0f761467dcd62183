#include "similarity_cuda.h"

#include <algorithm>

#include "similarity_launch.cuh"

namespace wscl::cuda {

Split choose_split(const SimilarityParams& p, bool output) {
  constexpr int64_t kTile = 64, kTiles = 4, kMostBytes = 64 << 20;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return {1, 0};
  const int64_t row_blocks = std::max<int64_t>(1, blocks_of(p)), rows = block_rows(p.precision);
  const int64_t columns = std::max<int64_t>(1, p.triangular ? p.y.count / 2 : p.y.count);
  const bool half = element_size(p.precision) == 2;
  // Time in columns. A part begins with loads of the rows, 100 columns' worth; its output is written and read
  // again, 8 bytes of memory for 4 multiply-adds a column: 300 columns on an A100, 385 on an H100, a sixth of
  // that in float32.
  const double part = 100 + (!output ? 0 : half ? 300 : 50);
  const int64_t room = processors * (half && p.d <= 128 ? 2 : 1);
  // Whole waves of blocks in one part, and what is left in several; sums of columns go band by band instead,
  // and where d is streamed a block of rows is several CTAs.
  const bool streamed = p.d > (half ? 256 : 128);
  const int64_t waves = output && !streamed && p.epilogue != Epilogue::kTags ? row_blocks / room : 0;
  Split best = {1, 0};
  double least = 1e300;
  for (const int64_t whole : {int64_t(0), std::max<int64_t>(0, waves - 1) * room, waves * room}) {
    const int64_t left = row_blocks - whole;
    const int64_t bytes = output ? std::min(p.x.count, left * rows) * padded_width(p.d) * 4 : 0;
    const int64_t most = std::min({columns / (kTile * kTiles), 4 * room, bytes ? kMostBytes / bytes : INT_MAX});
    for (int64_t splits = 1; splits <= std::max<int64_t>(1, most); ++splits) {
      const int64_t passes = (left * splits + room - 1) / room;
      const double time = static_cast<double>(whole / room) * (columns + part) +
                          static_cast<double>(passes) * (static_cast<double>(columns) / splits + part);
      if (time < least) {
        least = time;
        best = {static_cast<int>(splits), std::min(whole * rows, p.x.count)};
      }
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
