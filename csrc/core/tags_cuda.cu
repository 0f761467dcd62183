// In PyTorch:   sums = W @ values;  totals = W.sum(1);  W_ij from the bits of row i's and column j's tags
//
// Tile map. A CTA has kRows rows and kWidth columns of the values; it goes through its part of the columns of
// W:
//
//   for each tile of kColumns columns:
//     W[kRows][kColumns]        shared memory, a weight for each thread and step: bits are counted here
//     V[kColumns][kWidth]       shared memory
//     O[8][4] a thread          += W · V, float32 multiply-adds
//
// Sums of kTogether tiles are added up before they meet those of the tiles before, so that rounding errors stay
// small; parts are added up in double, in their order. Memory: V once a block of rows (from L2), tags once a
// tile, W never.
#include "tags_cuda.h"

#include <algorithm>

#include "workspace_cuda.h"

namespace wscl::cuda {
namespace {

constexpr int kRows = 64, kWidth = 64, kColumns = 32, kThreads = 128;
constexpr int kRowsEach = 8, kWidthEach = 4;  // of a thread
constexpr int kTogether = 8;                  // tiles
constexpr int kLeastTiles = 8;                // of a part
constexpr int64_t kMostBytes = 64 << 20;      // of the parts' sums

struct Params {
  TagProblem p;
  int splits;
  float* parts;    // [splits, n, d]
  double* totals;  // [splits, n]
};

__device__ __forceinline__ float weight_of(const TagProblem& p, const int64_t* row, const int64_t* column) {
  int both = 0, either = 0;
  for (int64_t w = 0; w < p.words; ++w) {
    both += __popcll(static_cast<unsigned long long>(row[w] & column[w]));
    either += __popcll(static_cast<unsigned long long>(row[w] | column[w]));
  }
  if (p.jaccard) return either ? __fdiv_rn(static_cast<float>(both), static_cast<float>(either)) : 0.f;
  return both ? 1.f : 0.f;
}

__global__ void __launch_bounds__(kThreads) add_weighted(const Params q) {
  const TagProblem& p = q.p;
  __shared__ float weights[kColumns][kRows + 4];  // rows are padded, so that writes down a column spread
  __shared__ __align__(16) float values[kColumns][kWidth];
  const int64_t row0 = int64_t(blockIdx.x) * kRows, d0 = int64_t(blockIdx.y) * kWidth;
  const int64_t tiles = (p.m + kColumns - 1) / kColumns;
  const int64_t first = tiles * blockIdx.z / q.splits, last = tiles * (blockIdx.z + 1) / q.splits;
  const int across = threadIdx.x % (kWidth / kWidthEach), down = threadIdx.x / (kWidth / kWidthEach);
  float sums[kRowsEach][kWidthEach] = {}, before[kRowsEach][kWidthEach] = {};
  double total = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t column0 = tile * kColumns;
    __syncthreads();  // everyone is done with the tile before
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int column = i / kRows, row = i % kRows;
      const bool live = row0 + row < p.n && column0 + column < p.m;
      weights[column][row] =
          live ? weight_of(p, p.row_tags + (row0 + row) * p.words, p.column_tags + (column0 + column) * p.words)
               : 0.f;
    }
    for (int i = threadIdx.x; i < kColumns * kWidth; i += kThreads) {
      const int column = i / kWidth, c = i % kWidth;
      const bool live = column0 + column < p.m && d0 + c < p.d;
      values[column][c] = live ? p.values[(column0 + column) * p.value_stride + d0 + c] : 0.f;
    }
    __syncthreads();  // weights and values are whole
    if (blockIdx.y == 0 && threadIdx.x < kRows) {
      float part = 0;
      for (int column = 0; column < kColumns; ++column) part += weights[column][threadIdx.x];
      total += part;
    }
#pragma unroll 4
    for (int column = 0; column < kColumns; ++column) {
      const float4 value = *reinterpret_cast<const float4*>(&values[column][across * kWidthEach]);
      float weight[kRowsEach];
#pragma unroll
      for (int r = 0; r < kRowsEach; r += 4)
        *reinterpret_cast<float4*>(&weight[r]) =
            *reinterpret_cast<const float4*>(&weights[column][down * kRowsEach + r]);
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        sums[r][0] = fmaf(weight[r], value.x, sums[r][0]);
        sums[r][1] = fmaf(weight[r], value.y, sums[r][1]);
        sums[r][2] = fmaf(weight[r], value.z, sums[r][2]);
        sums[r][3] = fmaf(weight[r], value.w, sums[r][3]);
      }
    }
    if ((tile - first) % kTogether != kTogether - 1 && tile + 1 < last) continue;
#pragma unroll
    for (int i = 0; i < kRowsEach * kWidthEach; ++i) {
      (&before[0][0])[i] += (&sums[0][0])[i];
      (&sums[0][0])[i] = 0;
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int64_t row = row0 + down * kRowsEach + r;
    if (row >= p.n) break;
#pragma unroll
    for (int c = 0; c < kWidthEach; ++c) {
      const int64_t column = d0 + across * kWidthEach + c;
      if (column < p.d) q.parts[(blockIdx.z * p.n + row) * p.d + column] = before[r][c];
    }
  }
  if (blockIdx.y == 0 && threadIdx.x < kRows && row0 + threadIdx.x < p.n)
    q.totals[blockIdx.z * p.n + row0 + threadIdx.x] = total;
}

__global__ void merge_parts(const Params q, const TagSums to) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, size = q.p.n * q.p.d;
  if (at < size) {
    double sum = 0;
    for (int s = 0; s < q.splits; ++s) sum += q.parts[s * size + at];
    to.sums[at] = static_cast<float>(sum);
  }
  if (at < q.p.n) {
    double sum = 0;
    for (int s = 0; s < q.splits; ++s) sum += q.totals[s * q.p.n + at];
    to.totals[at] = sum;
  }
}

int choose_parts(const TagProblem& p) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return 1;
  const int64_t ctas = (p.n + kRows - 1) / kRows * std::max<int64_t>(1, (p.d + kWidth - 1) / kWidth);
  const int64_t wanted = (4 * processors + ctas - 1) / std::max<int64_t>(1, ctas);
  const int64_t bytes = std::max<int64_t>(1, 4 * p.n * (p.d + 2));
  const int64_t most = std::min(p.m / (kColumns * kLeastTiles), kMostBytes / bytes);
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

}  // namespace

cudaError_t tag_weighted_sum(const TagProblem& p, TagSums& to, cudaStream_t stream) {
  Workspace space(to.workspace);
  Params params = {p, choose_parts(p), nullptr, nullptr};
  params.parts = space.take<float>(params.splits * p.n * p.d);
  params.totals = space.take<double>(params.splits * p.n);
  to.workspace_bytes = space.bytes();
  if (!to.workspace || p.n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((p.n + kRows - 1) / kRows),
                  static_cast<unsigned>(std::max<int64_t>(1, (p.d + kWidth - 1) / kWidth)), params.splits);
  add_weighted<<<grid, kThreads, 0, stream>>>(params);
  const int64_t size = p.n * std::max<int64_t>(1, p.d);
  merge_parts<<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(params, to);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
