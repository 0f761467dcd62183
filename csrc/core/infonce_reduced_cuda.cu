// A reduced loss of infonce_cuda.h: around the passes, what would else take a sort, searches and a dozen small
// launches more. (The host of an H200 takes 8 µs for a launch.)
#include "infonce_passes_cuda.cuh"
#include "sort_ids_cuda.h"

namespace wscl::cuda {
namespace {

// What the forward pass leaves for its backward pass.
struct Kept {
  int64_t *sorted_queries, *query_order, *sorted_keys, *key_order;
  float* scale;   // the problem's, where that is a constant
  float* share;   // of the loss's gradient, for every row with a positive
  double* stats;  // [2 or 4, n]
  Clusters clusters;

  Kept(const InfoNCEProblem& p, Workspace& space)
      : sorted_queries(space.take<int64_t>(p.n)),
        query_order(space.take<int64_t>(p.n)),
        sorted_keys(p.self ? sorted_queries : space.take<int64_t>(p.m)),
        key_order(p.self ? query_order : space.take<int64_t>(p.m)),
        scale(space.take<float>(1)),
        share(space.take<float>(1)),
        stats(space.take<double>((p.inner ? 4 : 2) * p.n)),
        clusters(p, space) {
    if (!p.scale) clusters.scale = scale;
  }

  // The same problem, whose ids in order, and whose scale, are here.
  InfoNCEProblem problem(InfoNCEProblem p) const {
    p.sorted_queries = sorted_queries;
    p.query_order = query_order;
    p.sorted_keys = sorted_keys;
    p.key_order = key_order;
    if (!p.scale) p.scale = scale;
    return p;
  }
};

// Ids that are to be sorted, and those that are already, which are copied.
struct Lists {
  IdList few[2];
  int count = 0;
  cudaError_t error = cudaSuccess;

  void add(const IdList& list, const int64_t* sorted, const int64_t* order, cudaStream_t stream) {
    if (!sorted) {
      few[count++] = list;
      return;
    }
    const size_t bytes = list.count * sizeof(int64_t);
    if (!error) error = cudaMemcpyAsync(list.sorted, sorted, bytes, cudaMemcpyDeviceToDevice, stream);
    if (!error) error = cudaMemcpyAsync(list.order, order, bytes, cudaMemcpyDeviceToDevice, stream);
  }
};

// The rows' losses, which are 0 without a positive, as one. One CTA, so that the order of the sum is fixed.
__global__ void __launch_bounds__(1024)
    reduce_rows(const float* losses, const int64_t* count, int64_t n, bool mean, float* loss, float* share) {
  double sum = 0, anchors = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    sum += losses[i];
    anchors += count[i] > 0;
  }
  sum = block_sum(sum);
  anchors = block_sum(anchors);
  if (threadIdx.x) return;
  const double whole = mean && anchors > 0 ? anchors : 1.;
  *loss = static_cast<float>(sum / whole);
  *share = static_cast<float>(1 / whole);
}

}  // namespace

int64_t infonce_kept_bytes(const InfoNCEProblem& p) {
  Workspace space;
  const Kept kept(p, space);
  return space.bytes();
}

cudaError_t infonce_reduced_forward(const InfoNCEProblem& given, InfoNCEReduced& to, cudaStream_t stream) {
  Workspace space(to.workspace), kept_space(to.kept);
  const Kept kept(given, kept_space);
  const InfoNCEProblem p = kept.problem(given);
  float* losses = space.take<float>(p.n);
  const bool keys_too = !p.self;
  const IdList queries = {p.query_clusters, p.n, kept.sorted_queries, kept.query_order,
                          given.sorted_queries ? nullptr : space.take<int64_t>(2 * p.n)};
  const IdList keys = {p.key_clusters, p.m, kept.sorted_keys, kept.key_order,
                       !keys_too || given.sorted_keys ? nullptr : space.take<int64_t>(2 * p.m)};
  InfoNCEForward rows;
  rows.loss = losses;
  rows.count = to.count;
  rows.stats = kept.stats;
  rows.direction = to.direction;
  rows.need_direction = to.need_direction;
  rows.clusters = &kept.clusters;
  if (to.workspace) rows.workspace = static_cast<char*>(to.workspace) + space.bytes();
  if (!to.workspace) {
    const cudaError_t error = infonce_forward(p, rows, stream);
    to.workspace_bytes = space.bytes() + rows.workspace_bytes;
    return error;
  }
  Lists lists;
  lists.add(queries, given.sorted_queries, given.query_order, stream);
  if (keys_too) lists.add(keys, given.sorted_keys, given.key_order, stream);
  cudaError_t error = lists.error;
  if (!error && lists.count) error = sort_ids(lists.few, lists.count, stream);
  // Of no queries the forward pass has nothing to ask.
  if (!error) error = p.n ? infonce_forward(p, rows, stream) : kept.clusters.find(p, stream);
  if (error) return error;
  reduce_rows<<<1, 1024, 0, stream>>>(losses, to.count, p.n, to.mean, to.loss, kept.share);
  return cudaGetLastError();
}

cudaError_t infonce_reduced_backward(const InfoNCEProblem& given, void* memory, InfoNCEBackward& to,
                                     cudaStream_t stream) {
  Workspace space(memory);
  const Kept kept(given, space);
  to.share = kept.share;
  to.count = kept.clusters.count;
  to.stats = kept.stats;
  to.clusters = &kept.clusters;
  const cudaError_t error = infonce_backward(kept.problem(given), to, stream);
  to.clusters = nullptr;
  return error;
}

}  // namespace wscl::cuda
