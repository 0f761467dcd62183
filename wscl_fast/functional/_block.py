"""One block of keys at a time, fused where the device serves, in plain PyTorch elsewhere.

For the keys B of one block, and upstream u_i of every query:

    lse_i  = log Σ_{j ∈ B, meets} e^{S_ij}        mean_i = Σ_{j ∈ B, meets} e^{S_ij − lse_i} k_j
    ∂/∂k_j = s Σ_i u_i e^{S_ij − lse_i} q_i        with the lse of all blocks together

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

__all__ = ["logsumexp", "logsumexp_backward", "nothing"]

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
    # The very shift of the forward pass, so that its rounding cancels in every probability.
    shift = (torch.where(stats[1] == 0, 0.0, stats[0]) * math.log(2)).to(queries.dtype)
    share = upstream / torch.where(stats[1] == 0, 1.0, stats[1]).to(queries.dtype)
    for columns in _slices(len(keys), COLUMNS):
        for rows in _slices(len(queries), ROWS):
            weights = (_logits(pairs, meets, rows, columns) - shift[rows, None]).exp()
            grad[columns] += pairs.scale * ((share[rows, None] * weights).T @ queries[rows])
    return grad


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
