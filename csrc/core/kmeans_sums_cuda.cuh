// The sums, counts and inertia of a block of rows whose assignments are known. No float atomics: rows are
// sorted by cluster and each cluster's are added up in their order, so the bits do not depend on timing.
#pragma once

#include "kmeans_passes_cuda.cuh"

namespace wscl::cuda {

// A stable sort of rows by cluster, by eight bits at a time.
struct ClusterSort {
  int passes;
  int32_t *keys[2], *order[2];  // [count] pass i reads [i % 2] and writes the other
  int32_t* digits;              // [256, tiles] rows of each digit in each tile, then where they go
  int32_t* totals;              // [256]

  ClusterSort(int most_rows, int64_t k, Workspace& space);
  const int32_t* sorted_keys() const {
    return keys[passes % 2];
  }
  const int32_t* sorted_order() const {
    return order[passes % 2];
  }
  cudaError_t run(const int64_t* assignment, int count, cudaStream_t stream) const;
};

struct ClusterSums {
  ClusterSort sort;
  int64_t width;          // columns of a sum: d, and with weights theirs
  int32_t* begin;         // [k + 1] where each cluster's rows begin
  double *heads, *tails;  // [chunks, width] of a cluster that began before the chunk; that goes on after it
  double* inertia_parts;  // [chunks]

  ClusterSums(const KMeansProblem& p, int most_rows, Workspace& space);
  // Adds the rows of a block to the problem's results, which were cleared before.
  cudaError_t add(const KMeansProblem& p, const KMeansBlock& block, cudaStream_t stream) const;
};

}  // namespace wscl::cuda
