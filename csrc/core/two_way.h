// The log-sum-exps of both directions over one similarity matrix, on the CPU. No torch, no Python.
//
//   row_lse_i    = log Σ_{j met by i} e^{scale · ⟨q_i, k_j⟩}
//   column_lse_j = log Σ_{i meets j}  e^{scale · ⟨q_i, k_j⟩}
//
// One product and one exponential a pair (two where logits are so large that a maximum is needed) forward;
// three products backward for the gradients of both sides. A row or column that meets nothing has −∞ and
// gradient 0.
#pragma once

#include "pairs_problem.h"

namespace wscl {

// One direction: log-sum-exps (forward) or their upstream gradients (backward), and base-2 statistics
// Σ e^{…} = sum · 2^shift, with sum = 0 and shift = −∞ where nothing is met. All [n] or [m].
template <class T, class Stat>
struct Direction {
  T* lse_or_grad;
  Stat *shift, *sum;
};

template <class In>
void two_way_forward(const PairsProblem<In>& problem, const Direction<Compute<In>, double>& rows,
                     const Direction<Compute<In>, double>& columns, const Threads& threads,
                     KeptLogits<Compute<In>> room = {});

// With upstream gradients g of the rows and h of the columns, and S the logits,
//   grad_queries_i = scale Σ_j (g_i e^{S_ij − row_lse_i} + h_j e^{S_ij − column_lse_j}) k_j, grad_keys alike.
// Either may be null; two products with one of them. Where both are wanted and the forward pass had room for
// its logits, the first product is not made again.
template <class In>
void two_way_backward(const PairsProblem<In>& problem, const Direction<const Compute<In>, const double>& rows,
                      const Direction<const Compute<In>, const double>& columns,
                      Compute<In>* grad_queries /* [n, d] */, Compute<In>* grad_keys /* [m, d] */,
                      const Threads& threads, KeptLogits<Compute<In>> room = {});

}  // namespace wscl
