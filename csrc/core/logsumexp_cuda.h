// The masked log-sum-exp on a CUDA device, with what its gradients need: the passes of logsumexp.h. No torch,
// no Python; everything is enqueued on one stream, nothing waits for the device.
#pragma once

#include "infonce_cuda.h"

namespace wscl::cuda {

enum class Meets : int { kAll, kSame, kOther };

// `pairs` says what queries and keys are, whose ids are whose, and who is whose own: with keys, `inner` is set
// where ids decide who meets whom. Its sorted ids are needed only there.
struct LogSumExpProblem {
  InfoNCEProblem pairs;
  Meets meets = Meets::kAll;
};

// Only bytes are counted, and nothing is enqueued, where `workspace` is null: pass that many the next time.
struct LogSumExpForward {
  float* lse = nullptr;     // [n]
  double* stats = nullptr;  // [2, n] shift and sum in base 2
  float* mean = nullptr;    // [n, d]
  bool need_mean = false;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t logsumexp_forward(const LogSumExpProblem& problem, LogSumExpForward& outputs, cudaStream_t stream);

struct LogSumExpKeyGradient {
  const float* grad = nullptr;    // [n]
  const double* stats = nullptr;  // [2, n] of these keys or of more
  void* grad_keys = nullptr;      // [m, d]
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
cudaError_t logsumexp_key_gradient(const LogSumExpProblem& problem, LogSumExpKeyGradient& outputs,
                                   cudaStream_t stream);

}  // namespace wscl::cuda
