// What the kernels of kmeans_cuda.h share: the centroids and the rows as the product sees them, the exact
// distance, and what one kernel hands to the next.
//
// The product.   score_ij = p_i · q_j − f_i · offset_j,   p_i = (x_i − origin) · scale · f_i,
//                                                          q_j = (c_j − origin) · scale
//
// is highest for the nearest centroid (offset_j = ‖q_j‖² / 2; for the cosine, of unit vectors, −origin · scale
// · q_j). The origin is the centroids' mean. scale brings the largest number of q into [½, 1) and f_i ≤ 1 that
// of p_i below 1, both powers of two: float16 then keeps 11 bits of either, nothing overflows, and one product
// serves every dtype, float32 as well.
//
// The bound.   With p̃ and q̃ rounded to float16, by Cauchy-Schwarz
//
//   |score~ − score| ≤ ‖p̃‖ · max_j ‖q_j − q̃_j‖ + ‖p_i − p̃_i‖ · max_j ‖q_j‖ + A · (‖p̃‖ · max_j ‖q̃_j‖ + f_i ·
//   max_j |offset_j|)
//
// where the losses are measured, not assumed. A covers the sum over d: a tensor core cuts each of b ≥ 4
// products and the accumulator off at 2^-23 of the largest and the result once more (Fasi, Higham, Mikaitis &
// Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021), so at most (b + 2) / b · d ≤ 1.5 d cuts,
// 3 d units of 2^-24; 48 more for what rounds once. 16 of float's last bits of a score are given up to the
// column's place in the tile, 32 units more.
#pragma once

#include <cuda_fp16.h>

#include "clusters_cuda.cuh"
#include "kmeans_cuda.h"
#include "workspace_cuda.h"

namespace wscl::cuda {

constexpr int kPiece = 64;        // columns of d that the product takes at a time
constexpr int kScanRows = 128;    // rows of a CTA
constexpr int kScanColumns = 64;  // centroids of a tile
constexpr int kLanes = 4;         // of a row; lane l sees columns 2 l and 2 l + 1 of every 8
constexpr unsigned kFullWarp = 0xffffffffu;

// Of the bound: |score~ − score| ≤ per_norm · ‖p‖ + per_loss · ‖p − p̃‖ + per_factor · f + constant.
struct TableBound {
  float per_norm, per_loss, per_factor, constant;
};

// The centroids, prepared once.
struct KMeansTable {
  int64_t k, d;
  int64_t columns_padded, depth;  // k and d rounded up to whole tiles
  bool cosine;
  const float* centroids;  // [k, d]
  double* inverse;         // [k] 1 / ‖c‖, 0 for zero; for the cosine
  double* partial;         // [slices, d] sums for the origin
  int slices;
  float* origin;                // [d]
  int32_t* exponent;            // of the largest number seen from the origin
  unsigned long long* largest;  // bits of doubles: ‖q‖², ‖q − q̃‖², |offset|
  TableBound* bound;
  __half* columns;  // [columns_padded, depth] q̃
  float* offset;    // [columns_padded]

  KMeansTable(const KMeansProblem& p, Workspace& space);
  cudaError_t prepare(const KMeansProblem& p, cudaStream_t stream) const;
};

// A block of rows on its way: what each kernel hands to the next.
struct KMeansBlock {
  int64_t first;  // row of x
  int count;
  int splits;              // of the columns, in the first scan
  int scan_ctas;           // of the second
  __half* rows;            // [count, depth] p̃
  float* factor;           // [count] f
  float* margin;           // [count] twice the bound
  double* inverse;         // [count] 1 / ‖x‖, 0 for zero; for the cosine
  float *best, *second;    // [splits, count, kLanes] the two highest scores of a lane
  int32_t* column;         // [splits, count, kLanes] of the best
  int32_t* undecided;      // how many rows the second scan goes through, then
  int64_t* list;           // [count] which
  float* least;            // [count] what a candidate's score has to reach, by place in the list
  double* again_distance;  // [parts, list, top] the second scan's results
  int32_t* again_column;
  double* near;  // [count] distance to the nearest, for the inertia
};

// How the second scan cuts its work: as many parts of the columns as keep the device busy.
struct Parts {
  int blocks, parts;
  __device__ __forceinline__ Parts(int rows, int ctas) {
    blocks = (rows + kScanRows - 1) / kScanRows;
    parts = max(1, min(ctas / max(1, blocks), 32));
  }
};

cudaError_t prepare_rows(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                         cudaStream_t stream);
cudaError_t scan(const KMeansTable& table, const KMeansBlock& block, cudaStream_t stream);
cudaError_t scan_again(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                       cudaStream_t stream);
cudaError_t decide(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                   cudaStream_t stream);
cudaError_t merge_again(const KMeansProblem& p, const KMeansTable& table, const KMeansBlock& block,
                        cudaStream_t stream);

template <class In>
__device__ __forceinline__ const In* row_of(const KMeansProblem& p, int64_t row) {
  return static_cast<const In*>(p.x) + row * p.x_stride;
}

// kWidth lanes of a warp that work on one row. The groups of a warp go through the same exchanges together, all
// lanes taking part.
template <int kWidth>
struct Group {
  static constexpr int kLanesInGroup = kWidth;

  static __device__ __forceinline__ int lane() {
    return threadIdx.x % kWidth;
  }
  // Index of this group in the grid.
  static __device__ __forceinline__ int64_t index() {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWidth;
  }
  // The lanes of this group for which it is so, as bits of the warp's.
  static __device__ __forceinline__ unsigned ballot(bool is_so) {
    const unsigned lanes = __ballot_sync(kFullWarp, is_so);
    return kWidth == 32 ? lanes : lanes & (((1u << kWidth % 32) - 1) << threadIdx.x % 32 / kWidth * kWidth);
  }
  template <class T>
  static __device__ __forceinline__ T sum(T x) {
#pragma unroll
    for (int lanes = kWidth / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
    return x;
  }
  template <class T>
  static __device__ __forceinline__ T max(T x) {
#pragma unroll
    for (int lanes = kWidth / 2; lanes > 0; lanes /= 2) {
      const T other = __shfl_xor_sync(kFullWarp, x, lanes);
      x = other > x ? other : x;
    }
    return x;
  }
};
using Warp = Group<32>;

// As many lanes as read a sector of 32 bytes of a row: fewer would waste memory's time, more the processor's.
template <class In>
using RowGroup = Group<32 / sizeof(In)>;

// ‖x − c‖² in float64, or half that of the unit vectors; a vector without a direction is at distance 1. The
// same for all lanes of the group, and the same order of sums for every centroid.
template <class G, class In>
__device__ __forceinline__ double exact_distance(const KMeansTable& t, const In* x, double inverse,
                                                 int64_t column) {
  const float* centroid = t.centroids + column * t.d;
  double sum = 0;
  if (t.cosine) {
    const double other = t.inverse[column];
    for (int64_t c = G::lane(); c < t.d; c += G::kLanesInGroup) {
      // No multiply-add: vectors that are a power of two apart have to come out as the same.
      const double apart = __dmul_rn(to_float(x[c]), inverse) - __dmul_rn(centroid[c], other);
      sum += apart * apart;
    }
    sum = G::sum(sum) / 2;
    return inverse == 0 || other == 0 ? 1 : sum;
  }
  for (int64_t c = G::lane(); c < t.d; c += G::kLanesInGroup) {
    const double apart = static_cast<double>(to_float(x[c])) - static_cast<double>(centroid[c]);
    sum += apart * apart;
  }
  return G::sum(sum);
}

__device__ __forceinline__ float saturate(double distance) {
  return static_cast<float>(fmin(distance, 3.4028234663852886e+38));
}

}  // namespace wscl::cuda
