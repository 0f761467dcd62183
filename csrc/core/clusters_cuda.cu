#include "clusters_cuda.cuh"

#include <algorithm>

namespace wscl::cuda {
namespace {

constexpr int kMostChunk = 128;  // rows that one CTA adds up
constexpr int kAtOnce = 16;      // loads in flight
constexpr int kSumThreads = 64;

// Where an id's members begin and end in sorted lists. Every step of a search waits for memory: all of them go
// side by side.
template <int kLists>
struct Places {
  int64_t begin[kLists] = {}, end[kLists] = {};

  __device__ __forceinline__ Places(const int64_t* const (&sorted)[kLists], const int64_t (&count)[kLists],
                                    int64_t id) {
    int64_t most = 1;
#pragma unroll
    for (int i = 0; i < kLists; ++i) most = max(most, count[i]);
    for (int64_t step = int64_t(1) << (63 - __clzll(most)); step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        const int64_t after_begin = begin[i] + step, after_end = end[i] + step;
        const bool later_begin = after_begin <= count[i] && sorted[i][after_begin - 1] < id;
        const bool later_end = after_end <= count[i] && sorted[i][after_end - 1] <= id;
        begin[i] = later_begin ? after_begin : begin[i];
        end[i] = later_end ? after_end : end[i];
      }
  }
};

__device__ __forceinline__ void describe_query(const InfoNCEProblem& p, const Clusters& c, int64_t i) {
  if (i == 0 && c.scale) *c.scale = p.constant_scale;
  if (i >= p.n) return;
  const int64_t id = p.query_clusters ? p.query_clusters[i] : 0;
  const bool ignored = p.query_clusters && id == p.ignore_index;
  int64_t begin = 0, end = 0, key_begin = 0, key_end = 0;
  if (p.sorted_keys) {
    const Places<2> places({p.sorted_queries, p.sorted_keys}, {p.n, p.m}, id);
    begin = places.begin[0];
    end = ignored ? begin : places.end[0];
    key_begin = places.begin[1];
    key_end = ignored ? key_begin : places.end[1];
  }
  int64_t own = p.self ? (p.exclude_self ? i : -1) : p.own ? p.own[i] : -1;
  if (own < 0 || own >= p.m) own = -1;
  const bool positive = own >= 0 && !ignored && p.key_clusters && p.key_clusters[own] == id;
  c.query_segment[i] = ignored ? -1 : static_cast<int32_t>(begin);
  c.query_begin[i] = static_cast<int32_t>(begin);
  c.query_end[i] = static_cast<int32_t>(end);
  c.key_begin[i] = static_cast<int32_t>(key_begin);
  c.key_end[i] = static_cast<int32_t>(key_end);
  c.own[i] = static_cast<int32_t>(own);
  c.own_positive[i] = positive;
  c.count[i] = key_end - key_begin - positive;
}

__device__ __forceinline__ void describe_key(const InfoNCEProblem& p, const Clusters& c, int64_t j) {
  bool valid = false;
  if (j < p.m) {
    const int64_t id = p.key_clusters ? p.key_clusters[j] : 0;
    valid = !p.key_clusters || id != p.ignore_index;
    int64_t segment = -1;
    if (p.sorted_queries && valid) {
      const Places<1> places({p.sorted_queries}, {p.n}, id);
      if (places.begin[0] < places.end[0]) segment = places.begin[0];
    }
    c.key_segment[j] = static_cast<int32_t>(segment);
  }
  const unsigned bits = __ballot_sync(0xffffffffu, valid);
  // Words are written to their end, past m as well.
  if (threadIdx.x % 32 == 0 && j < (p.m + kValidBits - 1) / kValidBits * kValidBits)
    reinterpret_cast<uint32_t*>(c.key_valid)[j / 32] = bits;
}

// Searches are long, and rows may be few: small CTAs, so that every multiprocessor has some.
constexpr unsigned kSearchThreads = 64;

// Queries in the first CTAs, keys in the others.
__global__ void describe(const InfoNCEProblem p, const Clusters c, unsigned query_blocks) {
  const bool query = blockIdx.x < query_blocks;
  const int64_t at = int64_t(query ? blockIdx.x : blockIdx.x - query_blocks) * kSearchThreads + threadIdx.x;
  if (query)
    describe_query(p, c, at);
  else
    describe_key(p, c, at);
}

struct SumsParams {
  Rows rows;
  const int64_t* order;
  const int32_t* segment;
  const float* weight;
  const int64_t* query_order;
  const int32_t *begin, *end;
  SegmentSums to;
};

// Compensated (Kahan's).
struct Sum {
  float sum = 0, lost = 0;

  __device__ __forceinline__ void add(float x) {
    const float y = x - lost, total = sum + y;
    lost = (total - sum) - y;
    sum = total;
  }
};

// Two neighbouring numbers as floats; `together`: where they are aligned for one load. `left` of them exist.
template <class In>
__device__ __forceinline__ float2 load_two(const In* from, bool together, int left) {
  struct alignas(2 * sizeof(In)) Two {
    In x, y;
  };
  if (!together) return make_float2(to_float(from[0]), left > 1 ? to_float(from[1]) : 0.f);
  const Two two = *reinterpret_cast<const Two*>(from);
  return make_float2(to_float(two.x), to_float(two.y));
}

// A CTA adds up a chunk of rows that follow each other in the order of ids, a thread two columns of them.
template <class In>
__global__ void __launch_bounds__(kSumThreads) add_chunk(const SumsParams p) {
  __shared__ int64_t row_of[kMostChunk];
  __shared__ int32_t segment_of[kMostChunk + 2];  // with those before and after
  __shared__ float weight_of[kMostChunk];
  const int chunk = p.to.chunk;
  const int64_t first = int64_t(blockIdx.x) * chunk;
  const int count = static_cast<int>(min(int64_t(chunk), p.to.count - first));
  for (int i = threadIdx.x; i < chunk + 2; i += kSumThreads) {
    const int64_t at = first + i - 1;
    const int64_t row = at >= 0 && at < p.to.count ? p.order[at] : -1;
    segment_of[i] = row >= 0 ? p.segment[row] : -1;
    if (i > 0 && i <= chunk) {
      row_of[i - 1] = row;
      weight_of[i - 1] = row >= 0 && p.weight ? p.weight[row] : 1.f;
    }
  }
  __syncthreads();
  const int column = 2 * (blockIdx.y * kSumThreads + threadIdx.x), left = static_cast<int>(p.to.d) - column;
  if (left <= 0) return;
  const In* data = static_cast<const In*>(p.rows.data) + column;
  const bool together =
      left > 1 && p.rows.stride % 2 == 0 && reinterpret_cast<uint64_t>(data) % (2 * sizeof(In)) == 0;
  Sum even, odd;
  bool began_before = segment_of[0] == segment_of[1];
  for (int i0 = 0; i0 < count; i0 += kAtOnce) {
    float2 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      x[i] = i0 + i < count && segment_of[i0 + i + 1] >= 0
                 ? load_two(data + row_of[i0 + i] * p.rows.stride, together, left)
                 : make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i0 + i >= count) break;
      even.add(weight_of[i0 + i] * x[i].x);
      odd.add(weight_of[i0 + i] * x[i].y);
      const int segment = segment_of[i0 + i + 1];
      const bool ends = segment_of[i0 + i + 2] != segment;
      if (!ends && i0 + i + 1 < count) continue;
      if (segment >= 0) {
        float* to = began_before ? p.to.heads + blockIdx.x * p.to.width
                    : ends       ? p.to.sums + segment * p.to.width
                                 : p.to.tails + blockIdx.x * p.to.width;
        // A row of sums is padded to four.
        *reinterpret_cast<float2*>(to + column) = make_float2(even.sum, odd.sum);
      }
      even = odd = {};
      began_before = false;
    }
  }
}

// The segment that begins in this CTA's chunk and goes on in the next, if there is one.
__global__ void add_parts(const SumsParams p) {
  const int64_t next = int64_t(blockIdx.x + 1) * p.to.chunk;
  const int segment = p.segment[p.order[next - 1]];
  if (segment < 0) return;
  const int64_t query = p.query_order[segment];
  const int first = p.begin[query] / p.to.chunk, last = (p.end[query] - 1) / p.to.chunk;
  if (first != static_cast<int>(blockIdx.x) || first == last) return;
  for (int column = threadIdx.x; column < p.to.d; column += blockDim.x) {
    Sum sum = {p.to.tails[first * p.to.width + column]};
#pragma unroll 8
    for (int64_t chunk = first + 1; chunk <= last; ++chunk) sum.add(p.to.heads[chunk * p.to.width + column]);
    p.to.sums[segment * p.to.width + column] = sum.sum;
  }
}

}  // namespace

Clusters::Clusters(const InfoNCEProblem& p, Workspace& space)
    : query_segment(space.take<int32_t>(p.n)),
      query_begin(space.take<int32_t>(p.n)),
      query_end(space.take<int32_t>(p.n)),
      key_begin(space.take<int32_t>(p.n)),
      key_end(space.take<int32_t>(p.n)),
      own(space.take<int32_t>(p.n)),
      own_positive(space.take<int32_t>(p.n)),
      count(space.take<int64_t>(p.n)),
      key_segment(space.take<int32_t>(p.m)),
      key_valid(space.take<uint64_t>((p.m + kValidBits - 1) / kValidBits)) {}

cudaError_t Clusters::find(const InfoNCEProblem& p, cudaStream_t stream) const {
  const unsigned queries = blocks_for(scale ? std::max<int64_t>(p.n, 1) : p.n, kSearchThreads);
  const unsigned blocks = queries + blocks_for(p.m, kSearchThreads);
  if (blocks) describe<<<blocks, kSearchThreads, 0, stream>>>(p, *this, queries);
  return cudaGetLastError();
}

SegmentSums::SegmentSums(int64_t rows, int64_t segments, int64_t d, Workspace& space)
    : count(rows),
      d(d),
      chunk(rows <= 16384   ? kAtOnce
            : rows <= 32768 ? 2 * kAtOnce
                            : kMostChunk),
      width(padded_width(d)),
      sums(space.take<float>(segments * width)),
      heads(space.take<float>((rows + chunk - 1) / chunk * width)),
      tails(space.take<float>((rows + chunk - 1) / chunk * width)) {}

cudaError_t SegmentSums::run(const InfoNCEProblem& p, const Rows& rows, const int64_t* order,
                             const int32_t* segment, const float* weight, const int32_t* begin,
                             const int32_t* end, cudaStream_t stream) const {
  if (count == 0 || p.n == 0 || d == 0) return cudaSuccess;
  const SumsParams params = {rows, order, segment, weight, p.query_order, begin, end, *this};
  const dim3 grid(blocks_for(count, chunk), blocks_for(d, 2 * kSumThreads));
  with_element(p.precision, [&](auto* element) {
    add_chunk<std::remove_pointer_t<decltype(element)>><<<grid, kSumThreads, 0, stream>>>(params);
  });
  if (count > chunk) add_parts<<<blocks_for(count, chunk) - 1, 128, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace wscl::cuda
