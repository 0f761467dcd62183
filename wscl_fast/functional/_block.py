"""One block of keys at a time, fused where the device serves, in plain PyTorch elsewhere.

For the keys B of one block, and upstream u_i of every query:

    lse_i  = log Σ_{j ∈ B, meets} e^{S_ij}        mean_i = Σ_{j ∈ B, meets} e^{S_ij − lse_i} k_j
    ∂/∂k_j = s Σ_i u_i e^{S_ij − lse_i} q_i        with the lse of all blocks together

and of both directions at once, the keys' own log-sum-exps over the queries among them.
In plain PyTorch the tiles are cut so that memory does not grow with N × M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from wscl_fast import _ops
from wscl_fast._ops import Block
from wscl_fast.pairs import Meets, Pairs, present

__all__ = ["logsumexp", "logsumexp_backward", "nothing", "two_way", "two_way_backward"]

ROWS = 1024
COLUMNS = 4096


def nothing(queries: Tensor, need_mean: bool) -> Block:
    """The block of no keys."""
    stats = queries.new_zeros(2, len(queries), dtype=torch.float64)
    stats[0] = -torch.inf
    return Block(stats, queries.new_zeros(len(queries) if need_mean else 0, queries.shape[1]))


def logsumexp(pairs: Pairs, meets: Meets, need_mean: bool, fused: bool) -> Block:
    """Log-sum-exp of every query over the keys that it meets, and their mean key where it is needed."""
    if fused:
        return _ops.logsumexp_block(pairs, meets, need_mean=need_mean)
    pairs = _present(pairs)
    queries, keys = pairs.queries, pairs.keys
    whole = nothing(queries, need_mean)
    for rows in _slices(len(queries), ROWS):
        block = nothing(queries[rows], need_mean)
        for columns in _slices(len(keys), COLUMNS):
            logits = _logits(pairs, meets, rows, columns)
            shift = logits.amax(1)
            weights = (logits - torch.where(shift == -torch.inf, 0.0, shift)[:, None]).exp()
            total = weights.sum(1)
            stats = torch.stack([shift.double() / math.log(2), total.double()])
            mean = block.mean
            if need_mean:
                mean = (weights / torch.where(total == 0, 1.0, total)[:, None]) @ keys[columns]
            block = _ops.merge_blocks(block, Block(stats, mean))
        whole.stats[:, rows] = block.stats
        if need_mean:
            whole.mean[rows] = block.mean
    return whole


def logsumexp_backward(pairs: Pairs, meets: Meets, stats: Tensor, upstream: Tensor, fused: bool) -> Tensor:
    """The gradient of the keys ``[M, d]``, for ``upstream [N]`` of the log-sum-exp that ``stats`` give."""
    if fused:
        return _ops.logsumexp_block_backward(upstream, pairs, stats, meets)
    pairs = _present(pairs)
    queries, keys = pairs.queries, pairs.keys
    grad = torch.zeros_like(keys)
    shift, share = _weights(stats, upstream)
    for columns in _slices(len(keys), COLUMNS):
        for rows in _slices(len(queries), ROWS):
            weights = (_logits(pairs, meets, rows, columns) - shift[rows, None]).exp()
            grad[columns] += pairs.scale * ((share[rows, None] * weights).T @ queries[rows])
    return grad


def two_way(pairs: Pairs, meets: Meets, fused: bool) -> tuple[Tensor, Tensor]:
    """The statistics of every query over the keys, and the other way round; no one has an own key."""
    if fused:
        return _ops.two_way_block(pairs, meets)
    both = (pairs, pairs.swapped())
    rows, columns = (logsumexp(side, meets, need_mean=False, fused=False).stats for side in both)
    return rows, columns


def two_way_backward(
    pairs: Pairs,
    meets: Meets,
    of_rows: tuple[Tensor, Tensor],  # their statistics over all blocks, and the gradients from above
    of_columns: tuple[Tensor, Tensor],
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients ``[N, d]`` and ``[M, d]`` of both sides from the pairs of this block."""
    if fused:
        stats, grads = zip(of_rows, of_columns, strict=True)
        return _ops.two_way_block_backward(*grads, pairs, *stats, meets)
    pairs = _present(pairs)
    queries, keys = pairs.queries, pairs.keys
    grad_queries, grad_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    (row_shift, row_share), (column_shift, column_share) = (_weights(*side) for side in (of_rows, of_columns))
    for columns in _slices(len(keys), COLUMNS):
        for rows in _slices(len(queries), ROWS):
            logits = _logits(pairs, meets, rows, columns)
            weights = row_share[rows, None] * (logits - row_shift[rows, None]).exp()
            weights += column_share[columns] * (logits - column_shift[columns]).exp()
            grad_queries[rows] += pairs.scale * (weights @ keys[columns])
            grad_keys[columns] += pairs.scale * (weights.T @ queries[rows])
    return grad_queries, grad_keys


def _weights(stats: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The shift of a log-sum-exp, and what its gradient gives to a pair with e to a logit less that shift."""
    # The very shift of the forward pass, so that its rounding cancels in every probability.
    nothing = stats[1] == 0
    shift = (torch.where(nothing, 0.0, stats[0]) * math.log(2)).to(upstream.dtype)
    return shift, upstream / torch.where(nothing, 1.0, stats[1]).to(upstream.dtype)


def _present(pairs: Pairs) -> Pairs:
    """Rows without an id may be anything, and must not weigh in even by 0."""
    return pairs._replace(
        queries=present(pairs.queries, pairs.query_ids, pairs.ignore_index),
        keys=present(pairs.keys, pairs.key_ids, pairs.ignore_index),
    )


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _logits(pairs: Pairs, meets: Meets, rows: slice, columns: slice) -> Tensor:
    logits = pairs.scale * (pairs.queries[rows] @ pairs.keys[columns].T)
    return logits.masked_fill(~pairs.tile(meets, rows, columns), -torch.inf)
