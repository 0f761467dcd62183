"""What ``return_stats=True`` tells of a batch: all of it from the loss's own pass and sums over clusters.

With LSE_i and p_ij the loss's own log-sum-exp and softmax over the keys D(i) of the denominator, s = 1 / t:

    entropy      H_i = LSE_i − Σ_j p_ij S_ij = LSE_i − s ⟨q_i, O_i⟩,  O_i the mean key that the pass carries
    similarity   q̄_i = ⟨q_i, Σ_{j ∈ P} k_j⟩ / |P|, one sum for each cluster; of negatives: of all, less it
    alignment    mean_{j ∈ P} ‖q_i − k_j‖² = ‖q_i‖² + mean ‖k_j‖² − 2 q̄_i
    uniformity   log mean e^{−‖q_i − k_j‖² s / 2} = log Σ_i e^{LSE_i} − s − log Σ_i |D(i)|, for unit vectors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.matching import squared_lengths
from wscl_fast.pairs import Pairs

__all__ = ["InfoNCEStats"]


class InfoNCEStats(NamedTuple):
    """What ``clustered_infonce(..., return_stats=True)`` tells beside the loss; without gradients.

    Means are over the queries that take part, each the mean over its keys (the uniformity's over the keys of
    all queries that meet any); NaN where there is nothing to average. The denominator's keys are all that a
    query may meet; with another denominator than ``"all"``, with hardness or with a prior those of other
    clusters. Similarities and distances are of the vectors as they are given. Over ranks the numbers are
    those of all ranks' queries, and a rank has its own rows.
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
    pairs: Pairs,  # whose queries may be scaled already
    scale: Tensor,  # 1 / temperature, 0-dim or [N]
    similarities: Tensor,  # as `_requests.Similarities` has them, of these pairs
    lse: Tensor,
    mean_logit: Tensor,
    everyone: bool,  # whether the denominator has the positives too
) -> RowStats:
    """From a pass's log-sum-exp and mean logit and sums over clusters, without another pass over pairs."""
    count, kind, allowed, pulled, pushed, squares = similarities
    wide = scale.double()
    positives, others = count.clamp(min=1), allowed - kind
    mean = pulled / wide / positives
    own_square = squared_lengths(pairs.queries) * (pairs.scale.double() / wide).square()
    return RowStats(
        lse.detach(),
        (allowed if everyone else others).long(),
        mean_logit.detach(),
        mean,
        torch.where(others > 0, pushed / wide / others.clamp(min=1), torch.nan),
        (own_square + squares / positives - 2 * mean).clamp(min=0),
    )


def alone(values: Tensor) -> Tensor:
    """The rows of all processes where there is one."""
    return values


@torch.no_grad()
def summarise(
    rows: RowStats, count: Tensor, scale: Tensor, gather: Callable[[Tensor], Tensor] = alone
) -> InfoNCEStats:
    """Rows to a result; ``gather`` gives the rows of all processes that share the loss."""
    takes_part = count > 0
    lse = rows.logsumexp
    finite = lse.masked_fill(lse == -torch.inf, 0)
    entropy = torch.where(rows.met > 0, (finite - rows.mean_logit).clamp(min=0), torch.nan)
    means = [rows.positive_similarity, rows.negative_similarity, rows.distance, entropy]
    used = torch.stack([takes_part & ~values.isnan() for values in means])
    sums = torch.where(used, torch.stack([values.double() for values in means]), 0.0).sum(1)
    sizes = [len(count), takes_part.sum(), rows.met.sum()]
    here = torch.stack([torch.as_tensor(size, device=lse.device).double() for size in sizes])
    potential = (lse - scale.detach()).double().logsumexp(0, keepdim=True)
    parts = gather(torch.cat([sums, used.sum(1).double(), here, potential])[None])
    *totals, size, share, met = parts[:, :-1].sum(0)
    similarity, dissimilarity, alignment, mean_entropy = (
        (total / of).to(lse.dtype) for total, of in zip(totals[:4], totals[4:], strict=True)
    )
    return InfoNCEStats(
        count,
        lse,
        (share / size).to(lse.dtype),
        similarity,
        dissimilarity,
        alignment,
        (parts[:, -1].logsumexp(0) - met.log()).to(lse.dtype),
        mean_entropy,
    )


def of_views(views: Sequence[InfoNCEStats]) -> InfoNCEStats:
    """Of several views, each a query of its own with as many positives and negatives: those of all queries.

    Rows are in the order of samples, the views of one side by side.
    """
    made = {}
    for name, values in zip(InfoNCEStats._fields, map(torch.stack, zip(*views, strict=True)), strict=True):
        made[name] = values.mean(0) if values.ndim == 1 else values.T.flatten()
        if name == "uniformity":
            made[name] = values.logsumexp(0) - math.log(len(views))
    return InfoNCEStats(**made)
