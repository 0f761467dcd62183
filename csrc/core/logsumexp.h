// The masked log-sum-exp on the CPU, with what its gradients need. No torch, no Python.
//
//   LSE_i = log Σ_{j met by i} e^{scale · ⟨q_i, k_j⟩},   mean_i = Σ_j softmax_ij k_j
//
// Row i meets every key, those of its own cluster, or those of other clusters, less its own key; queries and
// keys that have no cluster take no part. A row that meets nothing has LSE −∞ and gradient 0.
#pragma once

#include "pairs_problem.h"

namespace wscl {

// Base-2 statistics: Σ_j e^{scale ⟨q_i, k_j⟩} = sum_i · 2^shift_i, with sum_i = 0 and shift_i = −∞ where row i
// meets nothing. `mean` may be null, which saves the second GEMM.
template <class In>
void logsumexp_forward(const PairsProblem<In>& problem, Compute<In>* lse /* [n] */, double* shift /* [n] */,
                       double* sum /* [n] */, Compute<In>* mean /* [n, d] */, const Threads& threads);

// grad_keys_j = scale · Σ_i grad_i e^{scale ⟨q_i, k_j⟩} / (sum_i 2^shift_i) q_i. The statistics may be those of
// more keys than these: then it is these keys' exact gradient of the whole log-sum-exp.
template <class In>
void logsumexp_key_gradient(const PairsProblem<In>& problem, const Compute<In>* grad /* [n] */,
                            const double* shift /* [n] */, const double* sum /* [n] */,
                            In* grad_keys /* [m, d] */, const Threads& threads);

}  // namespace wscl
