"""The masked sum of softplus over pairs; what it computes is said in ``csrc/core/softplus.h``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wscl_fast._ops.extension import allow_tf32, compute_dtype, require
from wscl_fast._ops.logsumexp import arguments, fake_key_gradient
from wscl_fast._ops.registration import register, register_backward
from wscl_fast.pairs import Meets, Pairs


def softplus_sum(
    pairs: Pairs,  # whose scale may be of either sign here
    offset: Tensor,  # 0-dim or [N], of the scale's dtype
    meets: Meets = "all",
) -> Tensor:
    """``[N]``: Σ log(1 + e^{scale · q·k + offset}) over the keys that each query meets, differentiable.

    In plain PyTorch::

        T = pairs.scale * pairs.queries @ pairs.keys.T + offset[:, None]
        total = torch.nn.functional.softplus(T).masked_fill(~pairs.tile(meets), 0).sum(1)

    Rows, ids and own keys are as in :func:`logsumexp`. For Σ log(1 + e^{−t}) give the scale and the offset
    the other sign; since that is Σ log(1 + e^t) − t, the sigmoid loss of pairs (SigLIP: Zhai et al., *Sigmoid
    Loss for Language Image Pre-Training*, ICCV 2023, arXiv 2303.15343) is one such pass over all pairs, less
    the sum of t over the positives, which needs none.

    Gradients of queries, keys, scale and offset: 1 GEMM without the first three, 2 where keys need no
    gradient, 4 else.
    """
    queries, scale = pairs.queries, pairs.scale
    require(queries.device, queries.dtype)
    need_direction = torch.is_grad_enabled() and (queries.requires_grad or scale.requires_grad)
    *tensors, chosen, ignore_index = arguments(pairs, meets)
    total: Tensor = _forward_op(
        *tensors, offset.expand(len(queries)), chosen, ignore_index, need_direction, allow_tf32(queries)
    )[0]
    return total


class SoftplusBlock(NamedTuple):
    """The sum over one block of keys, with what its gradients need."""

    total: Tensor  # [N] float64
    slope: Tensor  # [N] float64: Σ σ(t), the sum's derivative in the offset
    direction: Tensor  # [N, d]: Σ σ(t) k, that in scale · q; [0, d] if not asked for

    def plus(self, other: SoftplusBlock) -> SoftplusBlock:
        """Over both blocks' keys, in this one's place."""
        return SoftplusBlock(*(a.add_(b) for a, b in zip(self, other, strict=True)))


def softplus_block(
    pairs: Pairs, offset: Tensor, meets: Meets = "all", *, need_direction: bool = True
) -> SoftplusBlock:
    """The forward pass of :func:`softplus_sum` over one of several blocks of keys, without autograd.

    With the sum of all blocks and the upstream gradient ``g`` the gradients are::

        grad_queries = scale * g[:, None] * direction
        grad_offset = g * slope
        grad_keys = softplus_block_backward(g, pairs, offset)  # of each block
    """
    require(pairs.queries.device, pairs.queries.dtype)
    *tensors, chosen, ignore_index = arguments(pairs, meets)
    with torch.no_grad():
        total, slope, direction = _forward_op(
            *tensors, offset, chosen, ignore_index, need_direction, allow_tf32(pairs.queries)
        )
    return SoftplusBlock(total.double(), slope.double(), direction)


def softplus_block_backward(grad: Tensor, pairs: Pairs, offset: Tensor, meets: Meets = "all") -> Tensor:
    """``[M, d]``: the gradient of one block's keys for ``grad [N]`` of the sum over all blocks. Two GEMMs."""
    require(pairs.queries.device, pairs.queries.dtype)
    *tensors, chosen, ignore_index = arguments(pairs, meets)
    with torch.no_grad():
        grad_keys: Tensor = _key_gradient_op(
            grad, *tensors, offset, chosen, ignore_index, allow_tf32(pairs.queries)
        )
    return grad_keys


def _fake_forward(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    meets: int,
    ignore_index: int,
    need_direction: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(n if need_direction else 0, d, dtype=dtype),
    )


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    *inputs, slope, direction = ctx.saved_tensors
    queries, scale = inputs[0], inputs[5]
    need_queries, need_keys, need_scale, need_offset = (ctx.needs_input_grad[i] for i in (0, 1, 5, 6))
    grad_keys = None
    if need_keys:
        grad_keys = _key_gradient_op(grad, *inputs, *ctx.options, allow_tf32(queries))
    return (
        ((scale * grad)[:, None] * direction).to(queries.dtype) if need_queries else None,
        grad_keys,
        *(None,) * 3,
        torch.where(slope == 0, 0.0, grad * (queries * direction).sum(1)).sum() if need_scale else None,
        grad * slope if need_offset else None,
        *(None,) * 4,
    )


_forward_op = register("softplus_sum", _fake_forward, _backward, tensors=7, options=2)
_key_gradient_op = register_backward("softplus_sum_key_gradient", fake_key_gradient)
