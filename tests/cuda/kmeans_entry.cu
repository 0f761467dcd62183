// What the tests of k-means call through ctypes.
#include "core/kmeans_cuda.h"

using namespace wscl::cuda;

extern "C" int wscl_kmeans(KMeansProblem* problem, void* stream) {
  return kmeans_pass(*problem, static_cast<cudaStream_t>(stream));
}

// The size of the struct, which ctypes has to agree with.
extern "C" int wscl_kmeans_size() {
  return sizeof(KMeansProblem);
}
