// Which clusters meet which, on the device, and sums over clusters.
//
// A segment is a cluster that a query names; its number is the place of its first query in the order of ids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "infonce_cuda.h"
#include "workspace_cuda.h"

namespace wscl::cuda {

constexpr unsigned kBlock = 256;

__host__ __device__ inline unsigned blocks_for(int64_t count, int64_t per_block = kBlock) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

struct Clusters {
  int32_t* query_segment;  // [n] −1 for an ignored query
  int32_t* query_begin;    // [n] where the segment's members lie in query_order; empty for an ignored one
  int32_t* query_end;
  int32_t* key_begin;  // [n] and in key_order
  int32_t* key_end;
  int32_t* own;            // [n] the key that a query does not meet, or −1
  int32_t* own_positive;   // [n] whether that one is of its cluster
  int64_t* count;          // [n] positives
  int32_t* key_segment;    // [m] −1 where no query names the cluster
  uint64_t* key_valid;     // [m bits] keys that have a cluster
  float* scale = nullptr;  // where the problem's constant goes, or null

  Clusters() = default;
  Clusters(const InfoNCEProblem& p, Workspace& space);
  cudaError_t find(const InfoNCEProblem& p, cudaStream_t stream) const;
};

// sums[s] = Σ_{r of segment s} weight_r · row_r, compensated, in an order that does not depend on timing.
struct SegmentSums {
  int64_t count, d;
  int chunk;  // rows that one CTA adds up: few where there are few, so that every multiprocessor has some
  int64_t width;
  float* sums;   // [n, width], of segments that have a member
  float* heads;  // [chunks, width] of a segment that began before the chunk
  float* tails;  // [chunks, width] of one that began in it and goes on

  SegmentSums(int64_t rows, int64_t segments, int64_t d, Workspace& space);

  // Rows in `order`; segment and weight (or null) by row. begin, end: of a query's segment in that order.
  cudaError_t run(const InfoNCEProblem& p, const Rows& rows, const int64_t* order, const int32_t* segment,
                  const float* weight, const int32_t* begin, const int32_t* end, cudaStream_t stream) const;
};

// What lies in memory, as a float.
__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ void store_float(float* to, float x) {
  *to = x;
}
__device__ __forceinline__ void store_float(__nv_bfloat16* to, float x) {
  *to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void store_float(__half* to, float x) {
  *to = __float2half_rn(x);
}

// f(a null pointer to the dtype in memory).
template <class F>
auto with_element(Precision precision, const F& f) {
  if (precision == Precision::kBFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  if (precision == Precision::kFloat16) return f(static_cast<__half*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

// The largest number of a CTA, for every thread.
template <int kThreads>
__device__ float block_max(float x) {
  __shared__ float of_warp[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) x = fmaxf(x, of_warp[warp]);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The sum of a CTA of 1024 threads, for its first.
__device__ inline double block_sum(double x) {
  __shared__ double of_warp[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return threadIdx.x < 32 ? warp_sum(of_warp[threadIdx.x]) : 0;
}

}  // namespace wscl::cuda
