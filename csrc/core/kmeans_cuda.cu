// The pass of kmeans_cuda.h: the centroids once, then the rows block by block, so that memory beyond the
// arguments stays bounded and a block's rows are still in the L2 cache when they are looked at again.
#include "kmeans_cuda.h"

#include <algorithm>

#include "kmeans_passes_cuda.cuh"
#include "kmeans_sums_cuda.cuh"

namespace wscl::cuda {
namespace {

constexpr int64_t kBlockBytes = 40 << 20;  // of a block's workspace, about
constexpr int64_t kRowBytes = 160;         // of a row beside its float16 numbers
constexpr int64_t kLeastRows = 1024, kMostRows = 1 << 19;
constexpr int kLeastTiles = 2;  // of a part of the columns
constexpr int kMostSplits = 32;

int processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device))
    return 1;
  return count;
}

int64_t rows_of_block(const KMeansProblem& p, const KMeansTable& table) {
  const int64_t fitting = kBlockBytes / (table.depth * 2 + kRowBytes) / kScanRows * kScanRows;
  return std::min(
      p.n, p.block_rows > 0 ? std::min(p.block_rows, kMostRows) : std::clamp(fitting, kLeastRows, kMostRows));
}

// The pieces of workspace for blocks of up to `count` rows.
KMeansBlock take_block(const KMeansProblem& p, const KMeansTable& table, int count, Workspace& space) {
  KMeansBlock b = {};
  b.count = count;
  const int64_t row_blocks = (count + kScanRows - 1) / kScanRows;
  const int64_t tiles = table.columns_padded / kScanColumns;
  const int64_t wish = 4 * processors() / std::max<int64_t>(1, row_blocks);
  b.splits =
      static_cast<int>(std::clamp<int64_t>(wish, 1, std::clamp<int64_t>(tiles / kLeastTiles, 1, kMostSplits)));
  b.scan_ctas = 2 * processors();
  const int64_t lanes = int64_t(b.splits) * count * kLanes;
  const int64_t again = std::max<int64_t>(b.scan_ctas, row_blocks) * kScanRows * p.top;
  b.rows = space.take<__half>(count * table.depth);
  b.factor = space.take<float>(count);
  b.margin = space.take<float>(count);
  b.inverse = space.take<double>(p.cosine ? count : 0);
  b.best = space.take<float>(lanes);
  b.second = space.take<float>(lanes);
  b.column = space.take<int32_t>(lanes);
  b.undecided = space.take<int32_t>(1);
  b.list = space.take<int64_t>(count);
  b.least = space.take<float>(count);
  b.again_distance = space.take<double>(again);
  b.again_column = space.take<int32_t>(again);
  b.near = space.take<double>(count);
  return b;
}

cudaError_t clear(const KMeansProblem& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const auto zero = [&](void* to, int64_t bytes) {
    if (to && bytes && !error) error = cudaMemsetAsync(to, 0, bytes, stream);
  };
  zero(p.sums, p.k * p.d * 8);
  zero(p.counts, p.k * 8);
  zero(p.weight_sums, p.k * 8);
  zero(p.inertia, 8);
  return error;
}

}  // namespace

cudaError_t kmeans_pass(KMeansProblem& p, cudaStream_t stream) {
  Workspace space(p.workspace);
  const KMeansTable table(p, space);
  const int rows = static_cast<int>(rows_of_block(p, table));
  KMeansBlock block = take_block(p, table, rows, space);
  const bool update = p.inertia != nullptr;
  const int64_t before = space.bytes();
  const ClusterSums sums(p, update ? rows : 0, space);
  p.workspace_bytes = update ? space.bytes() : before;
  if (!p.workspace) return cudaSuccess;

  cudaError_t error = clear(p, stream);
  if (!error) error = table.prepare(p, stream);
  for (block.first = 0; block.first < p.n && !error; block.first += rows) {
    block.count = static_cast<int>(std::min<int64_t>(rows, p.n - block.first));
    error = prepare_rows(p, table, block, stream);
    if (!error) error = scan(table, block, stream);
    if (!error) error = decide(p, table, block, stream);
    if (!error) error = scan_again(p, table, block, stream);
    if (!error) error = merge_again(p, table, block, stream);
    if (!error && update) error = sums.add(p, block, stream);
  }
  return error;
}

}  // namespace wscl::cuda
