// Passes over pairs of queries and keys on a CUDA device: log-sum-exps of one or both directions and sums of
// softplus, with what their gradients need; what they compute is said in logsumexp.h, two_way.h and softplus.h.
// No torch, no Python; everything is enqueued on one stream, nothing waits for the device.
//
// Of each pass only bytes are counted, and nothing is enqueued, where `workspace` is null: pass that many the
// next time.
#pragma once

#include "infonce_cuda.h"

namespace wscl::cuda {

enum class Meets : int { kAll, kSame, kOther };

// `pairs` says what queries and keys are, whose ids are whose, and who is whose own; `inner` is set where ids
// decide who meets whom, and sorted ids are needed only there. Ids may be null: everyone takes part.
struct PairsProblem {
  InfoNCEProblem pairs;
  Meets meets = Meets::kAll;
};

struct LogSumExpForward {
  float* lse = nullptr;     // [n]
  double* stats = nullptr;  // [2, n] shift and sum in base 2
  float* mean = nullptr;    // [n, d]
  bool need_mean = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t logsumexp_forward(const PairsProblem& problem, LogSumExpForward& outputs, cudaStream_t stream);

struct LogSumExpKeyGradient {
  const float* grad = nullptr;    // [n]
  const double* stats = nullptr;  // [2, n] of these keys or of more
  void* grad_keys = nullptr;      // [m, d], of the keys' dtype
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t logsumexp_key_gradient(const PairsProblem& problem, LogSumExpKeyGradient& outputs,
                                   cudaStream_t stream);

struct TwoWayForward {
  float *row_lse = nullptr, *column_lse = nullptr;       // [n], [m]
  double *row_stats = nullptr, *column_stats = nullptr;  // [2, n], [2, m]
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t two_way_forward(const PairsProblem& problem, TwoWayForward& outputs, cudaStream_t stream);

struct TwoWayBackward {
  const float *grad_rows = nullptr, *grad_columns = nullptr;
  const double *row_stats = nullptr, *column_stats = nullptr;
  float *grad_queries = nullptr, *grad_keys = nullptr;  // [n, d], [m, d]
  bool need_queries = false, need_keys = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t two_way_backward(const PairsProblem& problem, TwoWayBackward& outputs, cudaStream_t stream);

struct SoftplusForward {
  const float* offset = nullptr;           // [n]
  float *sum = nullptr, *slope = nullptr;  // [n]
  float* direction = nullptr;              // [n, d]
  bool need_direction = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t softplus_forward(const PairsProblem& problem, SoftplusForward& outputs, cudaStream_t stream);

struct SoftplusKeyGradient {
  const float *offset = nullptr, *grad = nullptr;  // [n]
  void* grad_keys = nullptr;                       // [m, d], of the keys' dtype
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t softplus_key_gradient(const PairsProblem& problem, SoftplusKeyGradient& outputs,
                                  cudaStream_t stream);

}  // namespace wscl::cuda
