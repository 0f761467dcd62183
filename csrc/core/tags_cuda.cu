// In PyTorch:   sums = W @ values;  totals = W.sum(1);  W_ij from the bits of row i's and column j's tags
//
// The pass of similarity_kernel.cuh with weights of tags for an epilogue: float32 values as three bfloat16
// terms, six products. d goes by slices, as nothing but the values depends on it; parts are merged in double,
// in their order, and are short enough that a float32 sum over one keeps its digits.
#include "tags_cuda.h"

#include <algorithm>

#include "similarity_launch.cuh"
#include "workspace_cuda.h"

namespace wscl::cuda {
namespace {

constexpr int64_t kSlice = 128;           // of d
constexpr int64_t kMostColumns = 8192;    // of a part, where memory allows it
constexpr int64_t kMostParts = 65535;     // of a grid
constexpr int64_t kMostBytes = 64 << 20;  // of the parts' sums

__global__ void merge_parts(const SimilarityParams p, float* sums, int64_t stride, double* totals) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = p.x.count;
  if (at < n * p.d) {
    const int64_t row = at / p.d, column = at % p.d;
    double sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += p.output[(s * n + row) * p.output_stride + column];
    sums[row * stride + column] = static_cast<float>(sum);
  }
  if (totals && at < n) {
    double sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += p.total[s * n + at];
    totals[at] = sum;
  }
}

cudaError_t run_tags(const SimilarityParams& p, cudaStream_t stream) {
  return p.d <= 64 ? launch<FloatTiling<3, 64>, Epilogue::kTags, true>(p, stream)
                   : launch<FloatTiling<3, 128>, Epilogue::kTags, true>(p, stream);
}

}  // namespace

cudaError_t tag_weighted_sum(const TagProblem& problem, TagSums& to, cudaStream_t stream) {
  SimilarityParams p;
  p.precision = Precision::kFloat32;
  p.epilogue = Epilogue::kTags;
  p.x.count = problem.n;
  p.y = {problem.values, problem.value_stride, nullptr, problem.m};
  p.d = std::min(problem.d, kSlice);
  p.row_tags = reinterpret_cast<const uint64_t*>(problem.row_tags);
  p.column_tags = reinterpret_cast<const uint64_t*>(problem.column_tags);
  p.words = problem.words;
  p.jaccard = problem.jaccard;
  p.output_stride = padded_width(p.d);
  const int64_t most = kMostBytes / std::max<int64_t>(1, p.x.count * p.output_stride * 4);
  const int64_t wanted = std::min({most, (problem.m + kMostColumns - 1) / kMostColumns, kMostParts});
  p.splits = std::max(choose_split(p, true).splits, static_cast<int>(wanted));
  Workspace space(to.workspace);
  p.output = space.take<float>(p.splits * p.x.count * p.output_stride);
  p.total = space.take<double>(p.splits * p.x.count);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || problem.n == 0) return cudaSuccess;
  // One slice at the least, for the totals.
  for (int64_t d0 = 0; d0 < std::max<int64_t>(1, problem.d); d0 += kSlice) {
    p.y.data = problem.values + d0;
    p.d = std::min(problem.d - d0, kSlice);
    p.output_stride = padded_width(p.d);
    if (const cudaError_t error = run_tags(p, stream)) return error;
    const int64_t size = problem.n * std::max<int64_t>(1, p.d);
    merge_parts<<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(p, to.sums + d0, problem.d,
                                                                               d0 ? nullptr : to.totals);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

}  // namespace wscl::cuda
