"""The clustered InfoNCE operators; what they compute is said in ``csrc/core/infonce.h``."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from wscl_fast._ops.extension import allow_tf32, compute_dtype, require
from wscl_fast._ops.registration import is_eager, once, register, register_backward
from wscl_fast._ops.room import room_for_logits, room_for_weights
from wscl_fast.values import may_look

Reduction = Literal["mean", "sum", "none"]

LARGE = 1 << 21  # numbers of a gradient that is worth the care: 8 MiB in float32


def clustered_infonce(
    queries: Tensor,  # [N, d]
    keys: Tensor | None,  # [M, d], or None where the queries are the keys
    query_clusters: Tensor,  # [N] int64
    key_clusters: Tensor | None,  # [M] int64
    own: Tensor | None,  # [N] int64
    scale: Tensor,  # 0-dim, 1 / temperature; float64 for float64 rows, else float32
    *,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    reduction: Reduction = "none",
    sparing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` and positives' count ``[N]`` of every row, by the fused kernels.

    Rows are float32, float64, bfloat16 or float16. Halves are computed with in float32, in which the loss is
    returned; their gradients have their own dtype. ``reduction`` says that nothing but the losses' mean, over
    the rows with a positive, or their sum is wanted: then it may be given instead of them, 0-dim, and its
    gradients are made along with it, those of both sides in three products instead of four. ``sparing`` says
    that no logits are to be kept for the backward pass, as they are within a small batch.
    """
    require(queries.device, queries.dtype)
    ids = query_clusters, key_clusters, own
    options = exclude_self, inner, ignore_index
    if reduction != "none":
        made = reduced_infonce(queries, keys, *ids, scale, 1.0, *options, reduction == "mean", sparing)
        if made is not None:
            return made
    need_direction = _needs_direction(queries, scale)
    room = room_for_logits(queries, None) if need_direction and keys is None and not sparing else 0
    if room:
        loss, count, *_ = _forward_in_batch_op(queries, query_clusters, scale, *options, room)
    else:
        loss, count, *_ = _forward_op(
            queries, keys, *ids, scale, *options, need_direction, allow_tf32(queries)
        )
    return loss, count


def reduced_infonce(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    scale: Tensor | None,
    constant_scale: float,  # where there is no tensor of it
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    mean: bool,
    sparing: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The losses' mean or sum and the positives' count, by operators that make no more of them; or None.

    On a CPU gradients can be made along with the loss, that of the keys not of halves, nor of ``inner``. A
    traced graph has them made in its backward pass, where their memory is needed.
    """
    if not is_eager():
        return None
    ids = query_clusters, key_clusters, own
    options = constant_scale, exclude_self, inner, ignore_index
    if queries.is_cuda:
        loss, count, *_ = _reduced_forward_op(
            queries, keys, *ids, scale, *options, mean, _needs_direction(queries, scale), allow_tf32(queries)
        )
        return loss, count
    if not queries.is_cpu:
        return None
    need_queries = need_keys = need_scale = False
    room = 0
    if torch.is_grad_enabled():
        need_keys = keys is not None and keys.requires_grad
        need_scale = scale is not None and scale.requires_grad
        need_queries = need_scale or queries.requires_grad
        if need_keys and (inner or not need_queries or not room_for_weights(keys)):
            return None
        if need_queries and keys is None and not sparing:
            room = room_for_logits(queries, None)
    loss, count, *_ = _reduced_op(
        queries, keys, *ids, scale, *options, mean, need_queries, need_keys, need_scale, room
    )
    return loss, count


def _needs_direction(queries: Tensor, scale: Tensor | None) -> bool:
    """The softmax-weighted mean key is carried along only where a gradient will be read off it."""
    of_scale = scale is not None and scale.requires_grad
    return torch.is_grad_enabled() and (queries.requires_grad or of_scale)


def _fake_forward(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    need_direction: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(n, dtype=torch.int64),
        queries.new_empty(4 if inner else 2, n, dtype=torch.float64),
        queries.new_empty(n if need_direction and keys is not None else 0, d, dtype=dtype),
    )


def _fake_reduced(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    scale: Tensor | None,
    constant_scale: float,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    mean: bool,
    need_queries: bool,
    need_keys: bool,
    need_scale: bool,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty((), dtype=dtype),
        queries.new_empty(n, dtype=torch.int64),
        queries.new_empty(n if need_queries else 0, d, dtype=dtype),
        queries.new_empty(keys.shape[0] if keys is not None and need_keys else 0, d),
        queries.new_empty((), dtype=dtype),
    )


def _fake_reduced_forward(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    scale: Tensor | None,
    constant_scale: float,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    mean: bool,
    need_direction: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    return (
        queries.new_empty((), dtype=dtype),
        queries.new_empty(n, dtype=torch.int64),
        queries.new_empty(n if need_direction and keys is not None else 0, d, dtype=dtype),
        queries.new_empty(_kept_bytes(n, None if keys is None else keys.shape[0], inner), dtype=torch.uint8),
    )


def _kept_bytes(n: int, m: int | None, inner: bool) -> int:
    """Of ``Kept`` in ``csrc/core/infonce_reduced_cuda.cu``, with ``Clusters``; ``m=None``: within a batch."""
    keys = n if m is None else m
    lists = [8 * n] * 2 + ([] if m is None else [8 * m] * 2)
    numbers = [4, 4, 8 * (4 if inner else 2) * n]
    clusters = [4 * n] * 7 + [8 * n, 4 * keys, (keys + 63) // 64 * 8]
    return sum((size + 255) // 256 * 256 for size in (*lists, *numbers, *clusters))


def _fake_reduced_backward(
    grad_loss: Tensor, queries: Tensor, keys: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_queries, need_keys, need_scale, _ = given
    n, d = queries.shape
    return (
        queries.new_empty(n if need_queries else 0, d),
        queries.new_empty(keys.shape[0] if keys is not None and need_keys else 0, d),
        queries.new_empty(() if need_scale else 0, dtype=compute_dtype(queries.dtype)),
    )


def _fake_backward(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    count: Tensor,
    stats: Tensor,
    direction: Tensor,
    need_queries: bool,
    need_keys: bool,
    need_scale: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = queries.shape
    dtype = compute_dtype(queries.dtype)
    # A CPU's kernels give this gradient in what they compute with, and within a batch read the scale's off
    # it; those of CUDA give it in the queries' own dtype, and the scale's by itself, or no number.
    on_cpu = queries.device.type == "cpu"
    from_queries = need_queries or (on_cpu and keys is None and need_scale)
    return (
        queries.new_empty(n if from_queries else 0, d, dtype=dtype if on_cpu else queries.dtype),
        queries.new_empty(keys.shape[0] if keys is not None and need_keys else 0, d),
        queries.new_empty(() if need_scale or on_cpu else 0, dtype=dtype),
    )


def _fake_forward_in_batch(
    queries: Tensor,
    clusters: Tensor,
    scale: Tensor,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (scale, exclude_self, inner, ignore_index)
    loss, count, stats, _ = _fake_forward(queries, None, clusters, None, None, *options, False)
    return loss, count, stats, loss.new_empty(room)


def _fake_backward_in_batch(
    grad_loss: Tensor, queries: Tensor, clusters: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(queries.dtype)
    return queries.new_empty(queries.shape, dtype=dtype), queries.new_empty((), dtype=dtype)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    *inputs, count, stats, direction = ctx.saved_tensors
    queries, scale = inputs[0], inputs[5]
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    in_place = need_queries and _is_last_use(direction)
    grad_queries, grad_keys, grad_scale = _backward_op(
        grad_loss,
        *inputs,
        *ctx.options,
        count,
        stats,
        direction,
        need_queries and not in_place,
        need_keys,
        need_scale,
        allow_tf32(queries),
    )
    if in_place:  # what the kernel does, to the bit
        rows = torch.where(count > 0, grad_loss.double() * scale.double(), 0.0)
        grad_queries = direction.mul_(rows.to(direction.dtype)[:, None])
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        grad_keys if need_keys else None,
        *(None,) * 3,
        grad_scale if need_scale else None,
        *(None,) * 5,
    )


def _backward_reduced_forward(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 13
    *inputs, _, direction, kept = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    made = _reduced_backward_op(
        grad_loss, *inputs, *ctx.options, direction, kept, *needed, allow_tf32(inputs[0])
    )
    grads = (grad if need else None for grad, need in zip(made, needed, strict=True))
    grad_queries, grad_keys, grad_scale = grads
    return grad_queries, grad_keys, *(None,) * 3, grad_scale, *(None,) * 7


def _backward_reduced(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 15
    queries, keys, _, _, _, scale, _, *made = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    if any(need > there for need, there in zip(needed, ctx.options[5:], strict=True)):
        raise RuntimeError(
            "need_queries, need_keys, need_scale: expected True where there is a gradient to be had"
        )
    factor = float(grad_loss) if type(grad_loss) is Tensor and may_look(grad_loss) else grad_loss
    grads: tuple[Tensor | None, ...] = tuple(
        _multiplied(grad, factor) if need else None for grad, need in zip(made, needed, strict=True)
    )
    if torch.is_grad_enabled():
        grads = once("infonce_reduced", (grad_loss, queries, keys, scale), grads)
    grad_queries, grad_keys, grad_scale = grads
    return (
        None if grad_queries is None else grad_queries.to(queries.dtype),
        grad_keys,
        *(None,) * 3,
        grad_scale,
        *(None,) * 9,
    )


def _backward_in_batch(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    queries, clusters, scale, count, stats, logits = ctx.saved_tensors
    grad_queries, grad_scale = _backward_in_batch_op(
        grad_loss, queries, clusters, scale, *ctx.options, count, stats, logits
    )
    need_queries, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        None,
        grad_scale if need_scale else None,
        *(None,) * 4,
    )


def _multiplied(grad: Tensor, factor: float | Tensor) -> Tensor:
    if not isinstance(factor, float):
        return grad * factor
    if not math.isfinite(factor):  # what nobody gives a gradient has none
        return torch.where(grad == 0, grad, grad * factor)
    if not _is_last_use(grad, 0 if factor == 1 else LARGE):
        return grad * factor
    return grad if factor == 1 else grad.mul_(factor)


def _is_last_use(kept: Tensor, least: int = LARGE) -> bool:
    """Whether what was kept may become the gradient that it is but for factors.

    This is the last backward pass to read it: its graph is not kept. Of ``least`` numbers it is worth it.
    """
    return (
        kept.numel() >= least
        and not torch.compiler.is_compiling()
        and kept.is_cpu
        and type(kept) is Tensor
        and not _keeps_graph()
    )


def _keeps_graph() -> bool:
    """Whether the backward pass under way leaves its graph for another; yes, where PyTorch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # no public name has it
    return ask is None or bool(ask())


_forward_op = register("infonce_forward", _fake_forward, _backward, tensors=6, options=3)
_backward_op = register_backward("infonce_backward", _fake_backward)
_reduced_forward_op = register(
    "infonce_reduced_forward", _fake_reduced_forward, _backward_reduced_forward, tensors=6, options=4
)
_reduced_backward_op = register_backward("infonce_reduced_backward", _fake_reduced_backward)
_reduced_op = register("infonce_reduced", _fake_reduced, _backward_reduced, tensors=6, options=8)
_forward_in_batch_op = register(
    "infonce_forward_in_batch", _fake_forward_in_batch, _backward_in_batch, tensors=3, options=3
)
_backward_in_batch_op = register_backward("infonce_backward_in_batch", _fake_backward_in_batch)
