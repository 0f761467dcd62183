"""The masked log-sum-exp operators; what they compute is said in ``csrc/core/logsumexp.h``."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wscl_fast._ops.extension import compute_dtype, extension, require

Meets = Literal["all", "same", "other"]
MEETS = {"all": 0, "same": 1, "other": 2}


class Block(NamedTuple):
    """Log-sum-exp of rows over one block of keys: ``Σ_j e^{S_ij} = stats[1, i] · 2^stats[0, i]``."""

    stats: Tensor  # [2, N] float64: shift in base 2 (−∞ where a row meets nothing), sum relative to it
    mean: Tensor  # [N, d] softmax-weighted mean key, 0 where a row meets nothing; [0, d] if not asked for

    def lse(self) -> Tensor:
        """Natural log-sum-exp ``[N]``, float64."""
        return (self.stats[0] + self.stats[1].log2()) * math.log(2)


def logsumexp(
    queries: Tensor,  # [N, d]
    keys: Tensor,  # [M, d]
    query_ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    own: Tensor | None,  # [N] int64: the key that row i never meets, outside [0, M) for none
    scale: Tensor,  # 0-dim, 1 / temperature
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
) -> Tensor:
    """``[N]``: log Σ e^{scale · q·k} over the keys that each row meets, differentiable.

    In plain PyTorch::

        S = scale * queries @ keys.T
        lse = S.masked_fill(~met, -inf).logsumexp(1)

    Row i meets every key (``"all"``), those with its own id (``"same"``) or those with another id
    (``"other"``), less key ``own[i]``. Keys whose id is ``ignore_index`` are met by no one, and a row whose
    id is ``ignore_index`` meets nothing. Both kinds of ids may be None with ``"all"``: then no one is
    ignored. A row that meets nothing has −∞ and passes no gradient on, whatever comes from above.

    Rows are float32, float64, bfloat16 or float16; halves are computed with in float32, in which the result
    is returned and ``scale`` expected. Gradients of queries, keys and scale: 1 GEMM under ``no_grad``, 2
    where keys need no gradient, 4 else.
    """
    require(queries.device, queries.dtype)
    need_mean = torch.is_grad_enabled() and (queries.requires_grad or scale.requires_grad)
    lse: Tensor = torch.ops.wscl_fast.logsumexp(
        queries, keys, query_ids, key_ids, own, scale, MEETS[meets], ignore_index, need_mean
    )[0]
    return lse


def softmax(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`logsumexp`, and the mean logit of every row under the softmax, ``[N]``, without a gradient.

    The mean logit is read off the mean key, which the pass carries along for the queries' gradient anyway.
    """
    require(queries.device, queries.dtype)
    lse, _, mean = torch.ops.wscl_fast.logsumexp(
        queries, keys, query_ids, key_ids, own, scale, MEETS[meets], ignore_index, True
    )
    return lse, scale.detach() * (queries.detach() * mean).sum(1)


def logsumexp_block(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
    need_mean: bool = True,
) -> Block:
    """The forward pass of :func:`logsumexp` over one of several blocks of keys, without autograd.

    Blocks of keys (of a ring of processes, of a queue in pieces) are merged by :func:`merge_blocks`. With
    the merged ``stats`` and ``mean`` and the upstream gradient ``g`` (0 where ``stats[1]`` is 0),
    the exact gradients are::

        grad_queries = scale * g[:, None] * mean
        grad_scale = (g * (queries * mean).sum(1)).sum()
        grad_keys = logsumexp_block_backward(g, queries, keys, ..., merged.stats)  # of each block

    ``own`` counts within the block's keys. One GEMM, two with ``need_mean``.
    """
    require(queries.device, queries.dtype)
    with torch.no_grad():
        _, stats, mean = torch.ops.wscl_fast.logsumexp(
            queries, keys, query_ids, key_ids, own, scale, MEETS[meets], ignore_index, need_mean
        )
    return Block(stats, mean)


def merge_blocks(a: Block, b: Block) -> Block:
    """What :func:`logsumexp_block` gives for the keys of both blocks together. O(N d)."""
    shift = torch.maximum(a.stats[0], b.stats[0])
    finite = torch.where(shift == -torch.inf, 0.0, shift)
    parts = [block.stats[1] * torch.exp2(block.stats[0] - finite) for block in (a, b)]
    total = parts[0] + parts[1]
    if len(a.mean) == 0 or len(b.mean) == 0:
        return Block(torch.stack((shift, total)), a.mean[:0])
    share = [(part / torch.where(total == 0, 1.0, total))[:, None].to(a.mean.dtype) for part in parts]
    return Block(torch.stack((shift, total)), share[0] * a.mean + share[1] * b.mean)


def logsumexp_block_backward(
    grad: Tensor,  # [N], of the merged log-sum-exp
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    stats: Tensor,  # [2, N] merged over all blocks
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
) -> Tensor:
    """``[M, d]``: the gradient of one block's keys, exact for the log-sum-exp over all blocks. Two GEMMs."""
    require(queries.device, queries.dtype)
    with torch.no_grad():
        grad_keys: Tensor = torch.ops.wscl_fast.logsumexp_key_gradient(
            grad, queries, keys, query_ids, key_ids, own, scale, MEETS[meets], ignore_index, stats
        )
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
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(2, n, dtype=torch.float64),
        queries.new_empty(n if need_mean else 0, d, dtype=dtype),
    )


def _fake_key_gradient(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    meets: int,
    ignore_index: int,
    stats: Tensor,
) -> Tensor:
    return queries.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, meets, ignore_index, _ = inputs
    _, stats, mean = output
    ctx.options = (meets, ignore_index)
    ctx.mark_non_differentiable(stats, mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats, mean)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    *inputs, stats, mean = ctx.saved_tensors
    queries, keys, query_ids, key_ids, own, scale = inputs
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    # Whatever comes from above for a row that meets nothing, even NaN, goes nowhere.
    grad = torch.where(stats[1] == 0, 0.0, grad)
    grad_queries = ((scale * grad)[:, None] * mean).to(queries.dtype) if need_queries else None
    grad_scale = (grad * (queries * mean).sum(1)).sum() if need_scale else None
    grad_keys = None
    if need_keys:
        grad_keys = torch.ops.wscl_fast.logsumexp_key_gradient(
            grad, queries, keys, query_ids, key_ids, own, scale, *ctx.options, stats
        )
    return grad_queries, grad_keys, None, None, None, grad_scale, None, None, None


def _no_double_backward(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("logsumexp: the fused kernels have no second derivative")


if extension is not None:
    torch.library.register_fake("wscl_fast::logsumexp", _fake_forward)
    torch.library.register_fake("wscl_fast::logsumexp_key_gradient", _fake_key_gradient)
    torch.library.register_autograd("wscl_fast::logsumexp", _backward, setup_context=_setup_context)
    torch.library.register_autograd("wscl_fast::logsumexp_key_gradient", _no_double_backward)
