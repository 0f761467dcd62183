// Clustered InfoNCE on the CPU: forward and backward passes. No torch, no Python.
//
//   S_ij   = scale · ⟨q_i, k_j⟩
//   LSE_i  = log Σ_{j allowed} e^{S_ij}         allowed: the key has a cluster and is not the query's own
//   "out"  : loss_i = LSE_i − mean_{j ∈ P(i)} S_ij
//   "in"   : loss_i = LSE_i − log mean_{j ∈ P(i)} e^{S_ij}
//
// Rows of halves are computed with in float; the gradient of the keys alone is rounded to their dtype.
//
// P(i) are the allowed keys of i's cluster. A query without a positive has loss 0 and takes no part.
#pragma once

#include <cstdint>

#include "similarity.h"

namespace wscl {

// What both passes read. Matrices are row-major with unit column stride.
template <class In>
struct InfoNCEProblem {
  const In* queries;  // [n, d]
  int64_t query_stride;
  int64_t n;
  const In* keys;  // [m, d], or null where the queries are the keys (then m = n)
  int64_t key_stride;
  int64_t m;
  int64_t d;
  const int64_t* query_clusters;  // [n]
  const int64_t* key_clusters;    // [m], null with `keys`
  const int64_t* own;             // [n] a query's own key, outside [0, m) for none; or null
  bool exclude_self;              // where the queries are the keys: i never meets i
  bool inner;                     // "in"
  int64_t ignore_index;
  double scale;  // 1 / temperature
};

constexpr int64_t infonce_stats(bool inner) {
  return inner ? 4 : 2;
}

// Kept from the forward pass for the backward pass: for each query the base-2 maximum and the sum of
// exponentials relative to it, over the allowed keys and, for "in", over the positives.
// Where keys are given and `direction` is not null, O_i − (mean or softmax mean of the positives) goes there:
// ∂loss_i / ∂(scale · q_i). One pass of two GEMMs with it, of one without.
template <class In>
void infonce_forward(const InfoNCEProblem<In>& problem, Compute<In>* loss /* [n] */, int64_t* count /* [n] */,
                     double* stats /* [2 or 4][n] */, Compute<In>* direction /* [n, d] or null */,
                     const Threads& threads, KeptLogits<Compute<In>> room = {});

// grad_loss [n] is any upstream gradient. With keys, `direction` is the forward pass's; grad_queries and
// grad_scale come from it in O(n d), grad_keys from one pass of two GEMMs. Where the queries are the keys,
// `direction` and grad_keys are null and everything comes from one half of the symmetric matrix: the forward
// pass costs half a GEMM, the backward pass one and a half, or one where the forward pass had room for its
// logits.
// Null outputs are not computed; there, grad_queries is always wanted. With keys it may be `direction` itself.
template <class In>
void infonce_backward(const InfoNCEProblem<In>& problem, const Compute<In>* grad_loss, const int64_t* count,
                      const double* stats, const Compute<In>* direction, Compute<In>* grad_queries /* [n, d] */,
                      In* grad_keys /* [m, d] */, double* grad_scale, const Threads& threads,
                      KeptLogits<Compute<In>> room = {});

// The mean of the losses over the queries with a positive, or their sum, and along with it the gradients of
// that number: none where grad_queries is null. That of the keys is asked for of "out" in float and double
// alone: then both gradients take three GEMMs, where the two passes above take four. Where the queries are the
// keys, `room` holds logits from one pass to the next.
template <class In>
double infonce_reduced(const InfoNCEProblem<In>& problem, bool mean, int64_t* count,
                       Compute<In>* grad_queries /* [n, d] or null */, In* grad_keys /* [m, d] or null */,
                       double* grad_scale /* or null */, const Threads& threads,
                       KeptLogits<Compute<In>> room = {});

}  // namespace wscl
