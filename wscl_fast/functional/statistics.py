"""What ``return_stats=True`` tells of a batch: all of it from the loss's own pass and sums over clusters.

With LSE_i and p_ij the loss's own log-sum-exp and softmax over the keys D(i) of the denominator, s = 1 / t:

    entropy      H_i = LSE_i − Σ_j p_ij S_ij = LSE_i − s ⟨q_i, O_i⟩,  O_i the mean key that the pass carries
    similarity   q̄_i = ⟨q_i, Σ_{j ∈ P} k_j⟩ / |P|, one sum for each cluster; of negatives: of all, less it
    alignment    mean_{j ∈ P} ‖q_i − k_j‖² = ‖q_i‖² + mean ‖k_j‖² − 2 q̄_i
    uniformity   log mean e^{−‖q_i − k_j‖² s / 2} = log Σ_i e^{LSE_i} − s − log Σ_i |D(i)|, for unit vectors
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.pairs import Pairs, allowed_count, allowed_sum, matching_count, matching_sum

__all__ = ["InfoNCEStats"]


class InfoNCEStats(NamedTuple):
    """What ``clustered_infonce(..., return_stats=True)`` tells beside the loss; without gradients.

    Means are over the queries that take part, each the mean over its keys; NaN where there is nothing to
    average. The denominator's keys are all that a query may meet; with another denominator than ``"all"``,
    with hardness or with a prior those of other clusters. Similarities and distances are of the vectors as
    they are given.
    """

    positives: Tensor  # [N] int64: each query's positives, 0 where it takes no part
    logsumexp: Tensor  # [N]: log Σ e^{S_ij} over the denominator's keys, −inf where there are none
    positive_share: Tensor  # 0-dim: the share of queries that take part
    positive_similarity: Tensor  # 0-dim: mean ⟨q, k⟩ of positives
    negative_similarity: Tensor  # 0-dim: mean ⟨q, k⟩ of the keys that are not of the query's kind
    alignment: Tensor  # 0-dim: mean squared distance of positives (Wang & Isola, ICML 2020, α = 2)
    uniformity: Tensor  # 0-dim: log mean e^{−‖q − k‖² / (2 t)} over the denominator's keys, of unit vectors
    entropy: Tensor  # 0-dim: mean entropy of the softmax over the denominator's keys, in nats


class RowStats(NamedTuple):
    """The same for every row, ``[N]``."""

    logsumexp: Tensor
    met: Tensor  # how many keys the denominator has
    mean_logit: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    distance: Tensor  # mean squared, of positives


@torch.no_grad()
def row_stats(
    positive: Pairs, negative: Pairs, lse: Tensor, mean_logit: Tensor, scale: Tensor, *, everyone: bool
) -> RowStats:
    """From a pass's log-sum-exp and mean logit, without another pass over pairs.

    ``scale`` is 1 / temperature, 0-dim or ``[N]``, whether the queries were multiplied by it or not;
    ``everyone`` says that the denominator has the positives too.
    """
    queries = positive.queries.double() * (positive.scale / scale).double().expand(len(lse))[:, None]
    count, same = matching_count(positive), matching_count(negative)
    others = allowed_count(negative) - same
    keys = positive.keys.double()
    pulled = (queries * matching_sum(positive, keys)).sum(1)
    pushed = (queries * (allowed_sum(negative, keys) - matching_sum(negative, keys))).sum(1)
    squares = matching_sum(positive, keys.square().sum(1, keepdim=True))[:, 0]
    mean, one = pulled / count.clamp(min=1), torch.ones((), dtype=torch.int64, device=count.device)
    return RowStats(
        lse.detach(),
        allowed_count(negative) if everyone else others,
        mean_logit,
        mean,
        torch.where(others > 0, pushed / torch.maximum(others, one), torch.nan),
        (queries.square().sum(1) + squares / count.clamp(min=1) - 2 * mean).clamp(min=0),
    )


@torch.no_grad()
def summarise(rows: RowStats, count: Tensor, scale: Tensor) -> InfoNCEStats:
    """Rows to a result."""
    takes_part = count > 0
    lse = rows.logsumexp
    finite = lse.masked_fill(lse == -torch.inf, 0)
    potential = (lse - scale.detach()).double().logsumexp(0) - rows.met.sum().double().log()

    def mean(values: Tensor) -> Tensor:
        use = takes_part & ~values.isnan()
        return (torch.where(use, values, 0.0).double().sum() / use.sum()).to(lse.dtype)

    return InfoNCEStats(
        count,
        lse,
        takes_part.to(lse.dtype).mean(),
        mean(rows.positive_similarity),
        mean(rows.negative_similarity),
        mean(rows.distance),
        potential.to(lse.dtype),
        mean(torch.where(rows.met > 0, (finite - rows.mean_logit).clamp(min=0), torch.nan)),
    )
