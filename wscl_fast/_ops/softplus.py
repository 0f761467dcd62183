"""The masked sum of softplus over pairs; what it computes is said in ``csrc/core/softplus.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wscl_fast._ops.extension import compute_dtype, extension, require
from wscl_fast._ops.logsumexp import MEETS, Meets


def softplus_sum(
    queries: Tensor,  # [N, d]
    keys: Tensor,  # [M, d]
    query_ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    own: Tensor | None,  # [N] int64: the key that row i never meets, outside [0, M) for none
    scale: Tensor,  # 0-dim, 1 / temperature, of either sign
    offset: Tensor,  # 0-dim or [N], of the scale's dtype
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
) -> Tensor:
    """``[N]``: Σ log(1 + e^{scale · q·k + offset}) over the keys that each query meets, differentiable.

    In plain PyTorch::

        T = scale * queries @ keys.T + offset[:, None]
        total = torch.nn.functional.softplus(T).masked_fill(~met, 0).sum(1)

    Who meets whom is said as in :func:`logsumexp`. For Σ log(1 + e^{−t}) give the scale and the offset the
    other sign; since that is Σ log(1 + e^t) − t, the sigmoid loss of pairs (SigLIP: Zhai et al., *Sigmoid
    Loss for Language Image Pre-Training*, ICCV 2023, arXiv 2303.15343) is one such pass over all pairs, less
    the sum of t over the positives, which needs none.

    Rows are float32, float64, bfloat16 or float16; halves are computed with in float32, in which the result
    is returned and ``scale`` and ``offset`` expected. Gradients of queries, keys, scale and offset: 1 GEMM
    without the first three, 2 where keys need no gradient, 4 else.
    """
    require(queries.device, queries.dtype)
    need_direction = torch.is_grad_enabled() and (queries.requires_grad or scale.requires_grad)
    total: Tensor = torch.ops.wscl_fast.softplus_sum(
        queries,
        keys,
        query_ids,
        key_ids,
        own,
        scale,
        offset.expand(len(queries)),
        MEETS[meets],
        ignore_index,
        need_direction,
    )[0]
    return total


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
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(n if need_direction else 0, d, dtype=dtype),
    )


def _fake_key_gradient(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    meets: int,
    ignore_index: int,
) -> Tensor:
    return queries.new_empty(keys.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, meets, ignore_index, _ = inputs
    _, slope, direction = output
    ctx.options = (meets, ignore_index)
    ctx.mark_non_differentiable(slope, direction)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, slope, direction)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *inputs, slope, direction = ctx.saved_tensors
    queries, scale = inputs[0], inputs[5]
    need_queries, need_keys, need_scale, need_offset = (ctx.needs_input_grad[i] for i in (0, 1, 5, 6))
    return (
        ((scale * grad)[:, None] * direction).to(queries.dtype) if need_queries else None,
        torch.ops.wscl_fast.softplus_sum_key_gradient(grad, *inputs, *ctx.options) if need_keys else None,
        *(None,) * 3,
        (grad * (queries * direction).sum(1)).sum() if need_scale else None,
        grad * slope if need_offset else None,
        *(None,) * 3,
    )


def _no_double_backward(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("softplus_sum: the fused kernels have no second derivative")


if extension is not None:
    torch.library.register_fake("wscl_fast::softplus_sum", _fake_forward)
    torch.library.register_fake("wscl_fast::softplus_sum_key_gradient", _fake_key_gradient)
    torch.library.register_autograd("wscl_fast::softplus_sum", _backward, setup_context=_setup_context)
    torch.library.register_autograd("wscl_fast::softplus_sum_key_gradient", _no_double_backward)
