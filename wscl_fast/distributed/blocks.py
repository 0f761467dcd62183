"""One block of keys at a time: its log-sum-exp with the mean key, the joining of blocks, and its gradient.

For the keys B of one rank, and upstream u_i of every query:

    lse_i  = log Σ_{j ∈ B, meets} e^{S_ij}        mean_i = Σ_{j ∈ B, meets} e^{S_ij − lse_i} k_j
    joined : lse = log(e^{lse_1} + e^{lse_2})      mean   = Σ_b e^{lse_b − lse} mean_b
    ∂/∂k_j = s Σ_i u_i e^{S_ij − lse_i} q_i        with the lse joined over all ranks' blocks

The tiles are cut so that memory does not grow with N × M.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wscl_fast.distributed.pairs import Meets, Pairs, matching_sum

__all__ = ["join", "logsumexp", "logsumexp_backward", "matching_backward"]

ROWS = 1024
COLUMNS = 4096


def _blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def join(lse: Tensor, mean: Tensor, other_lse: Tensor, other_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps ``[N]`` and mean keys ``[N, d]`` of two blocks, as those of both."""
    joined = torch.logaddexp(lse, other_lse)
    finite = torch.where(joined == -torch.inf, 0.0, joined)  # rows that met no key yet
    shares = ((part - finite).exp().to(mean.dtype)[:, None] for part in (lse, other_lse))
    return joined, mean * next(shares) + other_mean * next(shares)


def logsumexp(pairs: Pairs, meets: Meets, need_mean: bool) -> tuple[Tensor, Tensor]:
    """``lse [N]`` in double precision, −inf where a query meets none; ``mean [N, d]``, or ``[N, 0]``."""
    queries, keys = pairs.queries, pairs.keys
    width = keys.shape[1] if need_mean else 0
    lse = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)
    mean = queries.new_zeros(len(queries), width)
    for rows in _blocks(len(queries), ROWS):
        for columns in _blocks(len(keys), COLUMNS):
            logits = _logits(pairs, meets, rows, columns)
            shift = logits.amax(1)
            shift = torch.where(shift == -torch.inf, 0.0, shift)
            weights = (logits - shift[:, None]).exp()
            total = weights.sum(1)
            share = weights / torch.where(total == 0, 1.0, total)[:, None]
            lse[rows], mean[rows] = join(
                lse[rows], mean[rows], shift.double() + total.double().log(), share @ keys[columns, :width]
            )
    return lse, mean


def logsumexp_backward(pairs: Pairs, meets: Meets, lse: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of the keys ``[M, d]``, for the upstream gradients ``[N]`` of the joined ``lse [N]``."""
    queries, keys = pairs.queries, pairs.keys
    grad = torch.zeros_like(keys)
    finite = torch.where(lse == -torch.inf, 0.0, lse).to(queries.dtype)
    for columns in _blocks(len(keys), COLUMNS):
        for rows in _blocks(len(queries), ROWS):
            weights = (_logits(pairs, meets, rows, columns) - finite[rows, None]).exp()
            grad[columns] += pairs.scale * ((upstream[rows, None] * weights).T @ queries[rows])
    return grad


def matching_backward(pairs: Pairs, upstream: Tensor) -> Tensor:
    """``s Σ_i u_i q_i`` over the queries that have key j among those of their id, ``[M, d]``."""
    pulls = upstream[:, None] * pairs.queries
    turned = pairs._replace(
        queries=pairs.keys, keys=pairs.queries, query_ids=pairs.key_ids, key_ids=pairs.query_ids, own=None
    )
    grad = matching_sum(turned, pulls)
    if pairs.own is not None and len(grad):
        own = pairs.own.clamp(min=0)
        alike = (pairs.own >= 0) & (pairs.key_ids[own] == pairs.query_ids)
        grad.index_add_(0, own, torch.where(alike[:, None], -pulls, 0.0))
    return pairs.scale * grad


def _logits(pairs: Pairs, meets: Meets, rows: slice, columns: slice) -> Tensor:
    logits = pairs.scale * (pairs.queries[rows] @ pairs.keys[columns].T)
    return logits.masked_fill(~pairs.tile(meets, rows, columns), -torch.inf)
