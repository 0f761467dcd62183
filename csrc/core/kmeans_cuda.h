// K-means on a CUDA device: the pass of kmeans.h. No torch, no Python; pointers are device memory, everything
// is enqueued on one stream, nothing waits for the device.
//
//   assignment_i = argmin_j dist(x_i, c_j), the lowest j of equals
//   sums_k       = Σ_{i: assignment_i = k} w_i x_i          (x_i / ‖x_i‖ for the cosine)
//   counts_k     = Σ_{i: assignment_i = k} w_i
//   inertia      = Σ_i w_i dist(x_i, c_{assignment_i})
//
// In PyTorch:   distance, assignment = torch.cdist(x.double(), c.double()).square().min(dim=1)
//
// Assignments are those of exact arithmetic: one product of float16 proposes candidates whatever x's dtype, and
// where the bound of its error leaves more than one, float64 decides. See kmeans_passes_cuda.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "similarity_cuda.h"

namespace wscl::cuda {

constexpr int kMostTop = 8;

struct KMeansProblem {
  Precision precision = Precision::kFloat32;  // of x as it lies in memory
  const void* x = nullptr;                    // [n, d], unit column stride
  int64_t x_stride = 0;
  const float* centroids = nullptr;  // [k, d], contiguous; k < 2^31
  int64_t n = 0, d = 0, k = 0;
  bool cosine = false;
  int top = 1;             // nearest centroids wanted, at most kMostTop; 1 for an update
  int64_t block_rows = 0;  // rows that are on their way together; 0: as many as keep the workspace small

  int64_t* assignment = nullptr;  // [n, top]
  float* distance = nullptr;      // [n, top], at most the largest float
  int64_t* bad_row = nullptr;     // the first row that is not finite, or −1; then the results mean nothing

  // Of an update: null for an assignment alone.
  double* sums = nullptr;           // [k, d]
  const double* weights = nullptr;  // [n]; null: 1 each
  int64_t* counts = nullptr;        // [k], without weights
  double* weight_sums = nullptr;    // [k], with weights
  double* inertia = nullptr;

  // Only bytes are counted, and nothing is enqueued, where this is null: pass that many the next time.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

cudaError_t kmeans_pass(KMeansProblem& problem, cudaStream_t stream);

}  // namespace wscl::cuda
