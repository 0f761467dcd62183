// Ids in ascending order, and where each comes from: what InfoNCEProblem and PairsProblem ask for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace wscl::cuda {

// Lists that one multiprocessor sorts in less time than a sort by all of them takes to be enqueued (22 launches
// of about 10 µs, by what an H200's host took).
constexpr int64_t kMostSortedAtOnce = 1 << 16;

struct IdList {
  const int64_t* ids = nullptr;  // [count]
  int64_t count = 0;             // at most kMostSortedAtOnce
  int64_t* sorted = nullptr;     // [count]
  int64_t* order = nullptr;      // [count] ties as they come
  int64_t* spare = nullptr;      // [2 count]
};

// One launch for all `lists`, of which there are one or two.
cudaError_t sort_ids(const IdList* lists, int count, cudaStream_t stream);

}  // namespace wscl::cuda
