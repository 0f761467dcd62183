// A stable radix sort of short lists in one launch, a CTA a list: eight bits a pass, and passes only over the
// digits in which ids differ, of which a clustering has one or two. A library's sort of 64 bits launches twenty
// kernels, which cost more than all the rest of a small loss.
//
// Every warp owns a run of rows and a row of counters, so that nothing is counted atomically: rows of a warp
// that share a digit find each other by `match`, and their first counts for all.
#include "sort_ids_cuda.h"

namespace wscl::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBits = 8;
constexpr int kDigits = 1 << kBits;
constexpr int kAhead = 4;  // rows of a lane that are fetched before the first is used
constexpr unsigned kAllLanes = 0xffffffffu;

struct IdLists {
  IdList of[2];
};

// Where a pass finds its rows; the first reads the list itself, in its own order.
struct SortRows {
  const int64_t* ids;
  const int64_t* order;  // or null

  __device__ __forceinline__ int64_t place(int at) const {
    return order ? order[at] : at;
  }
};

// The sign's bit is turned, so that unsigned digits order signed ids.
__device__ __forceinline__ unsigned digit_of(int64_t id, int shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(id) ^ (uint64_t(1) << 63)) >> shift) & (kDigits - 1);
}

// The bits in which any two ids differ, for every thread.
__device__ uint64_t varying_bits(const IdList& list, uint64_t* of_warp) {
  const int64_t first = list.ids[0];
  uint64_t bits = 0;
  for (int at = threadIdx.x; at < list.count; at += kThreads)
    bits |= static_cast<uint64_t>(list.ids[at] ^ first);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) bits |= of_warp[warp];
  return bits;
}

// f(at, id, of my row's digit the lanes of this warp that have it too) for every row of this warp, in order;
// all lanes call it, those without a row with at = −1.
template <class F>
__device__ __forceinline__ void for_rows(const SortRows& from, int begin, int end, int shift, const F& f) {
  for (int start = begin; start < end; start += 32 * kAhead) {
    int64_t id[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = start + 32 * i + threadIdx.x % 32;
      id[i] = at < end ? from.ids[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = start + 32 * i + threadIdx.x % 32;
      const unsigned digit = at < end ? digit_of(id[i], shift) : kDigits;
      f(at < end ? at : -1, id[i], digit, __match_any_sync(kAllLanes, digit));
    }
  }
}

// Counts become the places where the rows of a warp and digit begin.
__device__ void place_digits(int (*counts)[kDigits], int* of_warp) {
  int total = 0;
  if (threadIdx.x < kDigits)
    for (int warp = 0; warp < kWarps; ++warp) total += counts[warp][threadIdx.x];
  int before = total;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, before, lanes);
    if (threadIdx.x % 32 >= lanes) before += lower;
  }
  if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = before;
  __syncthreads();
  if (threadIdx.x < kDigits) {
    int place = before - total;
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) place += of_warp[warp];
    for (int warp = 0; warp < kWarps; ++warp) {
      const int rows = counts[warp][threadIdx.x];
      counts[warp][threadIdx.x] = place;
      place += rows;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) sort_lists(const IdLists lists) {
  __shared__ int counts[kWarps][kDigits];
  __shared__ int totals[kWarps];
  __shared__ uint64_t bits_of_warp[kWarps];
  const IdList list = blockIdx.x ? lists.of[1] : lists.of[0];
  if (list.count == 0) return;
  const int count = static_cast<int>(list.count), lane = threadIdx.x % 32;
  int* const mine = counts[threadIdx.x / 32];
  const int run = (count + kThreads - 1) / kThreads * 32;
  const int begin = min(count, static_cast<int>(threadIdx.x / 32) * run), end = min(count, begin + run);
  const uint64_t bits = varying_bits(list, bits_of_warp);
  int left = 0;  // passes to come; the last writes the result, and those before it by turns
  for (int shift = 0; shift < 64; shift += kBits) left += (bits >> shift & (kDigits - 1)) != 0;
  SortRows from{list.ids, nullptr};
  if (left == 0)
    for (int at = threadIdx.x; at < count; at += kThreads) {
      list.sorted[at] = list.ids[at];
      list.order[at] = at;
    }
  for (int shift = 0; left > 0; shift += kBits) {
    if ((bits >> shift & (kDigits - 1)) == 0) continue;
    --left;
    int64_t* const ids = left % 2 ? list.spare : list.sorted;
    int64_t* const order = left % 2 ? list.spare + count : list.order;
    for (int digit = lane; digit < kDigits; digit += 32) mine[digit] = 0;
    __syncwarp();
    for_rows(from, begin, end, shift, [&](int at, int64_t, unsigned digit, unsigned alike) {
      if (at >= 0 && lane == __ffs(alike) - 1) mine[digit] += __popc(alike);
      __syncwarp();
    });
    __syncthreads();
    place_digits(counts, totals);
    for_rows(from, begin, end, shift, [&](int at, int64_t id, unsigned digit, unsigned alike) {
      const int place = at < 0 ? 0 : mine[digit] + __popc(alike & ((1u << lane) - 1));
      __syncwarp();
      if (at >= 0) {
        ids[place] = id;
        order[place] = from.place(at);
        if (lane == __ffs(alike) - 1) mine[digit] += __popc(alike);
      }
      __syncwarp();
    });
    __syncthreads();
    from = {ids, order};
  }
}

}  // namespace

cudaError_t sort_ids(const IdList* lists, int count, cudaStream_t stream) {
  IdLists both;
  int64_t most = 0;
  for (int i = 0; i < count; ++i) {
    both.of[i] = lists[i];
    most = lists[i].count > most ? lists[i].count : most;
  }
  if (most > kMostSortedAtOnce) return cudaErrorInvalidValue;
  if (most > 0) sort_lists<<<count, kThreads, 0, stream>>>(both);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
