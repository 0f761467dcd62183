"""The masked log-sum-exp operators; what they compute is said in ``csrc/core/logsumexp.h``.

Rows of :class:`wscl_fast.pairs.Pairs` are float32, float64, bfloat16 or float16; halves are computed with in
float32, in which results are returned and the scale is expected. Ids may be None with ``meets="all"``: then
no one is ignored. An own key outside of the keys is none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wscl_fast._ops.extension import allow_tf32, compute_dtype, require
from wscl_fast._ops.registration import register, register_backward
from wscl_fast.pairs import Meets, Pairs

MEETS = {"all": 0, "same": 1, "other": 2}


def arguments(pairs: Pairs, meets: Meets) -> tuple[Tensor | int | None, ...]:
    """What every operator over pairs takes, in its order, with the options at the end."""
    return (*pairs[:6], MEETS[meets], pairs.ignore_index)


class Block(NamedTuple):
    """Log-sum-exp of rows over one block of keys: ``Σ_j e^{S_ij} = stats[1, i] · 2^stats[0, i]``."""

    stats: Tensor  # [2, N] float64: shift in base 2 (−∞ where a row meets nothing), sum relative to it
    mean: Tensor  # [N, d] softmax-weighted mean key, 0 where a row meets nothing; [0, d] if not asked for

    def lse(self) -> Tensor:
        """Natural log-sum-exp ``[N]``, float64."""
        return (self.stats[0] + self.stats[1].log2()) * math.log(2)


def logsumexp(pairs: Pairs, meets: Meets = "all") -> Tensor:
    """``[N]``: log Σ e^{scale · q·k} over the keys that each row meets, differentiable.

    In plain PyTorch::

        S = pairs.scale * pairs.queries @ pairs.keys.T
        lse = S.masked_fill(~pairs.tile(meets), -inf).logsumexp(1)

    A row that meets nothing has −∞ and passes no gradient on, whatever comes from above. Gradients of
    queries, keys and scale: 1 GEMM under ``no_grad``, 2 where keys need no gradient, 4 else.
    """
    require(pairs.queries.device, pairs.queries.dtype)
    need_mean = torch.is_grad_enabled() and (pairs.queries.requires_grad or pairs.scale.requires_grad)
    lse: Tensor = _forward_op(*arguments(pairs, meets), need_mean, allow_tf32(pairs.queries))[0]
    return lse


def softmax(pairs: Pairs, meets: Meets = "all") -> tuple[Tensor, Tensor]:
    """:func:`logsumexp`, and the mean logit of every row under the softmax, ``[N]``, without a gradient.

    The mean logit is read off the mean key, which the pass carries along for the queries' gradient anyway.
    """
    require(pairs.queries.device, pairs.queries.dtype)
    lse, _, mean = _forward_op(*arguments(pairs, meets), True, allow_tf32(pairs.queries))
    return lse, pairs.scale.detach() * (pairs.queries.detach() * mean).sum(1)


def logsumexp_block(pairs: Pairs, meets: Meets = "all", *, need_mean: bool = True) -> Block:
    """The forward pass of :func:`logsumexp` over one of several blocks of keys, without autograd.

    Blocks of keys (of a ring of processes, of a queue in pieces) are merged by :func:`merge_blocks`. With
    the merged ``stats`` and ``mean`` and the upstream gradient ``g`` (0 where ``stats[1]`` is 0),
    the exact gradients are::

        grad_queries = scale * g[:, None] * mean
        grad_scale = (g * (queries * mean).sum(1)).sum()
        grad_keys = logsumexp_block_backward(g, pairs, merged.stats)  # of each block

    Own keys count within the block. One GEMM, two with ``need_mean``.
    """
    require(pairs.queries.device, pairs.queries.dtype)
    with torch.no_grad():
        _, stats, mean = _forward_op(*arguments(pairs, meets), need_mean, allow_tf32(pairs.queries))
    return Block(stats, mean)


def merge_blocks(a: Block, b: Block) -> Block:
    """What :func:`logsumexp_block` gives for the keys of both blocks together. O(N d).

    The first one's mean keys are written over, and become those of both.
    """
    shift = torch.maximum(a.stats[0], b.stats[0])
    finite = torch.where(shift == -torch.inf, 0.0, shift)
    parts = [block.stats[1] * torch.exp2(block.stats[0] - finite) for block in (a, b)]
    total = parts[0] + parts[1]
    if len(a.mean) == 0 or len(b.mean) == 0:
        return Block(torch.stack((shift, total)), a.mean[:0])
    share = [(part / torch.where(total == 0, 1.0, total))[:, None].to(a.mean.dtype) for part in parts]
    return Block(torch.stack((shift, total)), a.mean.mul_(share[0]).addcmul_(share[1], b.mean))


def logsumexp_block_backward(
    grad: Tensor,  # [N], of the merged log-sum-exp
    pairs: Pairs,
    stats: Tensor,  # [2, N] merged over all blocks
    meets: Meets = "all",
) -> Tensor:
    """``[M, d]``: the gradient of one block's keys, exact for the log-sum-exp over all blocks. Two GEMMs."""
    require(pairs.queries.device, pairs.queries.dtype)
    with torch.no_grad():
        grad_keys: Tensor = _key_gradient_op(grad, *arguments(pairs, meets), stats, allow_tf32(pairs.queries))
    return grad_keys


def _fake_forward(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    meets: int,
    ignore_index: int,
    need_mean: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(2, n, dtype=torch.float64),
        queries.new_empty(n if need_mean else 0, d, dtype=dtype),
    )


def fake_key_gradient(grad: Tensor, queries: Tensor, keys: Tensor, *_: Any) -> Tensor:
    """Of the operators that give the gradient of the keys alone."""
    return queries.new_empty(keys.shape)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *inputs, stats, mean = ctx.saved_tensors
    queries, keys, query_ids, key_ids, own, scale = inputs
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    # Whatever comes from above for a row that meets nothing, even NaN, goes nowhere.
    nothing = stats[1] == 0
    grad = torch.where(nothing, 0.0, grad)
    grad_queries = ((scale * grad)[:, None] * mean).to(queries.dtype) if need_queries else None
    grad_scale = None
    if need_scale:
        grad_scale = torch.where(nothing, 0.0, grad * (queries * mean).sum(1)).sum()
    grad_keys = None
    if need_keys:
        grad_keys = _key_gradient_op(
            grad, queries, keys, query_ids, key_ids, own, scale, *ctx.options, stats, allow_tf32(queries)
        )
    return grad_queries, grad_keys, None, None, None, grad_scale, None, None, None, None


_forward_op = register("logsumexp", _fake_forward, _backward, tensors=6, options=2)
_key_gradient_op = register_backward("logsumexp_key_gradient", fake_key_gradient)
