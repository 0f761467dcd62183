// What the tests call through ctypes.
#include "core/infonce_cuda.h"
#include "core/pairs_cuda.h"
#include "core/similarity_cuda.h"
#include "core/sort_ids_cuda.h"
#include "core/tags_cuda.h"

using namespace wscl::cuda;

extern "C" int wscl_similarity(const SimilarityParams* params, void* stream) {
  return run_similarity(*params, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_infonce_forward(const InfoNCEProblem* problem, InfoNCEForward* outputs, void* stream) {
  return infonce_forward(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_infonce_backward(const InfoNCEProblem* problem, InfoNCEBackward* outputs, void* stream) {
  return infonce_backward(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t wscl_infonce_kept_bytes(const InfoNCEProblem* problem) {
  return infonce_kept_bytes(*problem);
}

extern "C" int wscl_infonce_reduced_forward(const InfoNCEProblem* problem, InfoNCEReduced* outputs,
                                            void* stream) {
  return infonce_reduced_forward(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_infonce_reduced_backward(const InfoNCEProblem* problem, void* kept,
                                             InfoNCEBackward* outputs, void* stream) {
  return infonce_reduced_backward(*problem, kept, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_tag_weighted_sum(const TagProblem* problem, TagSums* outputs, void* stream) {
  return tag_weighted_sum(*problem, *outputs, static_cast<cudaStream_t>(stream));
}

extern "C" int wscl_sort_ids(const IdList* lists, int count, void* stream) {
  return sort_ids(lists, count, static_cast<cudaStream_t>(stream));
}

// The sizes of the structs, which ctypes has to agree with.
extern "C" int wscl_size(int which) {
  const int sizes[] = {sizeof(SimilarityParams), sizeof(InfoNCEProblem), sizeof(InfoNCEForward),
                       sizeof(InfoNCEBackward), sizeof(InfoNCEReduced)};
  return sizes[which];
}

#define WSCL_PAIRS_ENTRY(name, Outputs, function)                                    \
  extern "C" int name(const PairsProblem* problem, Outputs* outputs, void* stream) { \
    return function(*problem, *outputs, static_cast<cudaStream_t>(stream));          \
  }
WSCL_PAIRS_ENTRY(wscl_logsumexp, LogSumExpForward, logsumexp_forward)
WSCL_PAIRS_ENTRY(wscl_logsumexp_key_gradient, LogSumExpKeyGradient, logsumexp_key_gradient)
WSCL_PAIRS_ENTRY(wscl_two_way, TwoWayForward, two_way_forward)
WSCL_PAIRS_ENTRY(wscl_two_way_backward, TwoWayBackward, two_way_backward)
WSCL_PAIRS_ENTRY(wscl_softplus, SoftplusForward, softplus_forward)
WSCL_PAIRS_ENTRY(wscl_softplus_key_gradient, SoftplusKeyGradient, softplus_key_gradient)

extern "C" int wscl_pairs_size(int which) {
  const int sizes[] = {sizeof(PairsProblem),       sizeof(LogSumExpForward), sizeof(LogSumExpKeyGradient),
                       sizeof(TwoWayForward),      sizeof(TwoWayBackward),   sizeof(SoftplusForward),
                       sizeof(SoftplusKeyGradient)};
  return sizes[which];
}

extern "C" int wscl_tags_size(int which) {
  return which ? sizeof(TagSums) : sizeof(TagProblem);
}
