// The masked sum of softplus on the CPU, with what its gradients need: sigmoid losses over pairs (SigLIP), and
// denominators that hold one positive at a time. No torch, no Python.
//
//   t_ij  = scale · ⟨q_i, k_j⟩ + offset_i
//   sum_i = Σ_{j met by i} log(1 + e^{t_ij}),   slope_i = Σ_j σ(t_ij),   direction_i = Σ_j σ(t_ij) k_j
//
// The scale may have either sign. A row that meets nothing has zeros.
#pragma once

#include "pairs_problem.h"

namespace wscl {

// `direction` may be null, which saves the second GEMM.
template <class In>
void softplus_forward(const PairsProblem<In>& problem, const Compute<In>* offset /* [n] */,
                      Compute<In>* sum /* [n] */, Compute<In>* slope /* [n] */,
                      Compute<In>* direction /* [n, d] */, const Threads& threads);

// grad_keys_j = scale · Σ_i grad_i σ(t_ij) q_i
template <class In>
void softplus_key_gradient(const PairsProblem<In>& problem, const Compute<In>* offset /* [n] */,
                           const Compute<In>* grad /* [n] */, In* grad_keys /* [m, d] */,
                           const Threads& threads);

}  // namespace wscl
