// Clustered InfoNCE on a CUDA device: the passes of infonce.h. No torch, no Python; pointers are device memory,
// everything is enqueued on one stream, nothing waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "similarity_cuda.h"

namespace wscl::cuda {

struct Clusters;

// What both passes read. Matrices are row-major with unit column stride; fewer than 2^31 rows.
struct InfoNCEProblem {
  Precision precision = Precision::kFloat32;
  const void* queries = nullptr;  // [n, d]
  int64_t query_stride = 0;
  int64_t n = 0;
  bool self = false;           // the queries are the keys (then m = n)
  const void* keys = nullptr;  // [m, d]
  int64_t key_stride = 0;
  int64_t m = 0;
  int64_t d = 0;
  const int64_t* query_clusters = nullptr;  // [n]
  const int64_t* key_clusters = nullptr;    // [m]; with `self`: query_clusters
  const int64_t* own = nullptr;             // [n] a query's own key, outside [0, m) for none; or null
  bool exclude_self = false;                // with `self`: i never meets i
  bool inner = false;                       // "in"
  int64_t ignore_index = -1;
  const float* scale = nullptr;  // 1 / temperature, a number in device memory
  float constant_scale = 0;      // of a reduced loss, where there is none

  // The ids in ascending order, and where each comes from; with `self` those of the keys are the queries'. Null
  // where nobody asks who is of whose cluster (as ids may be then): log-sum-exps over all keys.
  const int64_t* sorted_queries = nullptr;  // [n]
  const int64_t* query_order = nullptr;     // [n]
  const int64_t* sorted_keys = nullptr;     // [m]
  const int64_t* key_order = nullptr;       // [m]
};

// Outputs as in infonce.h; `loss` and `direction` are float32 for every precision. Only bytes are counted, and
// nothing is enqueued, where `workspace` is null: pass that many the next time.
struct InfoNCEForward {
  float* loss = nullptr;       // [n]
  int64_t* count = nullptr;    // [n]
  double* stats = nullptr;     // [2 or 4, n]
  float* direction = nullptr;  // [n, d]
  bool need_direction = false;
  const Clusters* clusters = nullptr;  // where what the ids say is kept; null: nowhere
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t infonce_forward(const InfoNCEProblem& problem, InfoNCEForward& outputs, cudaStream_t stream);

struct InfoNCEBackward {
  const float* grad_loss = nullptr;  // [n], or one number,
  const float* share = nullptr;      // of which this part goes to every row with a positive
  const int64_t* count = nullptr;
  const double* stats = nullptr;
  const float* direction = nullptr;
  void* grad_queries = nullptr;  // [n, d], of the queries' dtype, like
  void* grad_keys = nullptr;     // [m, d]
  float* grad_scale = nullptr;
  bool need_queries = false, need_keys = false, need_scale = false;
  const Clusters* clusters = nullptr;  // what the forward pass kept; null: found again
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t infonce_backward(const InfoNCEProblem& problem, InfoNCEBackward& outputs, cudaStream_t stream);

// The same of the rows' sum, or of their mean over those with a positive: one number. Ids that no one has
// sorted (kMostSortedAtOnce at most) are sorted here; the scale may be a number of the host's. What the forward
// pass finds out, its backward pass reads in `kept`.
struct InfoNCEReduced {
  bool mean = false;
  float* loss = nullptr;       // one number
  int64_t* count = nullptr;    // [n]
  float* direction = nullptr;  // [n, d]
  bool need_direction = false;
  void* kept = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
int64_t infonce_kept_bytes(const InfoNCEProblem& problem);
cudaError_t infonce_reduced_forward(const InfoNCEProblem& problem, InfoNCEReduced& outputs,
                                    cudaStream_t stream);
// Of `outputs` all but count, stats, share and clusters.
cudaError_t infonce_reduced_backward(const InfoNCEProblem& problem, void* kept, InfoNCEBackward& outputs,
                                     cudaStream_t stream);

}  // namespace wscl::cuda
