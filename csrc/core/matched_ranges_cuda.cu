#include "infonce_passes_cuda.cuh"

namespace wscl::cuda {
namespace {

__global__ void invert(const int64_t* order, int64_t count, int32_t* position) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p < count) position[order[p]] = static_cast<int32_t>(p);
}

__global__ void match_queries(const InfoNCEProblem p, const Clusters c, const MatchedRanges r) {
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (position >= p.n) return;
  const int64_t i = p.query_order[position];
  r.key_begin[position] = c.key_begin[i];
  r.key_end[position] = c.key_end[i];
  r.own[position] = c.own[i] < 0 ? -1 : r.key_position[c.own[i]];
}

// The queries of a key's cluster; none, but in its place, where there is none.
__global__ void match_keys(const InfoNCEProblem p, const Clusters c, const MatchedRanges r) {
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool valid = position < p.m && p.sorted_keys[position] != p.ignore_index;
  const unsigned bits = __ballot_sync(0xffffffffu, valid);
  // Words are written to their end, past m as well.
  if (threadIdx.x % 32 == 0 && position < (p.m + kValidBits - 1) / kValidBits * kValidBits)
    reinterpret_cast<uint32_t*>(r.key_valid)[position / 32] = bits;
  if (position >= p.m) return;
  const int32_t segment = c.key_segment[p.key_order[position]];
  int32_t begin = 0, end = 0;
  if (segment >= 0) {
    begin = segment;
    end = c.query_end[p.query_order[segment]];
  } else {
    const int64_t id = p.sorted_keys[position];
    int64_t high = p.n;
    while (begin < high) {
      const int64_t middle = (begin + high) / 2;
      if (p.sorted_queries[middle] < id)
        begin = static_cast<int32_t>(middle + 1);
      else
        high = middle;
    }
    end = begin;
  }
  r.query_begin[position] = begin;
  r.query_end[position] = end;
}

}  // namespace

MatchedRanges::MatchedRanges(const InfoNCEProblem& p, Workspace& space)
    : key_begin(space.take<int32_t>(p.n)),
      key_end(space.take<int32_t>(p.n)),
      own(space.take<int32_t>(p.n)),
      query_begin(space.take<int32_t>(p.m)),
      query_end(space.take<int32_t>(p.m)),
      key_valid(space.take<uint64_t>((p.m + kValidBits - 1) / kValidBits)),
      key_position(space.take<int32_t>(p.m)),
      query_position(space.take<int32_t>(p.n)) {}

cudaError_t MatchedRanges::find(const InfoNCEProblem& p, const Clusters& clusters, cudaStream_t stream) const {
  if (p.m) invert<<<blocks_for(p.m), kBlock, 0, stream>>>(p.key_order, p.m, key_position);
  if (p.n) invert<<<blocks_for(p.n), kBlock, 0, stream>>>(p.query_order, p.n, query_position);
  if (p.n) match_queries<<<blocks_for(p.n), kBlock, 0, stream>>>(p, clusters, *this);
  if (p.m) match_keys<<<blocks_for(p.m), kBlock, 0, stream>>>(p, clusters, *this);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
