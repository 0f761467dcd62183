"""The clustered InfoNCE operators; what they compute is said in ``csrc/core/infonce.h``."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from wscl_fast._ops.extension import allow_tf32, compute_dtype, require
from wscl_fast._ops.registration import register, register_backward
from wscl_fast._ops.room import room_for_logits, room_for_weights
from wscl_fast.values import may_look

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
    alike: bool = False,
    sparing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` and positives' count ``[N]`` of every row, by the fused kernels.

    Rows are float32, float64, bfloat16 or float16. Halves are computed with in float32, in which the loss is
    returned; their gradients have their own dtype. ``alike`` says that the rows will count alike in what is
    differentiated: then the keys' gradient may be made along with the loss, for three products instead of
    four. Where they do not, it is made again. ``sparing`` says that no logits are to be kept for the backward
    pass, as they are within a small batch.
    """
    require(queries.device, queries.dtype)
    # The softmax-weighted mean key is carried along only where a gradient will be read off it.
    need_direction = torch.is_grad_enabled() and (queries.requires_grad or scale.requires_grad)
    if alike and need_direction and not inner and keys is not None and room_for_weights(keys):
        loss, count, _, _, _ = torch.ops.wscl_fast.infonce_forward_both(
            queries, keys, query_clusters, key_clusters, own, scale, exclude_self, inner, ignore_index
        )
        return cast(Tensor, loss), cast(Tensor, count)
    if need_direction and keys is None and not sparing and (room := room_for_logits(queries, None)):
        loss, count, _, _ = torch.ops.wscl_fast.infonce_forward_in_batch(
            queries, query_clusters, scale, exclude_self, inner, ignore_index, room
        )
        return cast(Tensor, loss), cast(Tensor, count)
    loss, count, _, _ = torch.ops.wscl_fast.infonce_forward(
        queries,
        keys,
        query_clusters,
        key_clusters,
        own,
        scale,
        exclude_self,
        inner,
        ignore_index,
        need_direction,
        allow_tf32(queries),
    )
    return cast(Tensor, loss), cast(Tensor, count)


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


def _fake_forward_both(
    queries: Tensor,
    keys: Tensor,
    query_clusters: Tensor,
    key_clusters: Tensor,
    own: Tensor | None,
    scale: Tensor,
    exclude_self: bool,
    inner: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids = (query_clusters, key_clusters, own)
    results = _fake_forward(queries, keys, *ids, scale, exclude_self, inner, ignore_index, True)
    return *results, torch.empty_like(keys, memory_format=torch.contiguous_format)


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
    # it; those of CUDA give it in the queries' own dtype, and the scale's by itself.
    on_cpu = queries.device.type == "cpu"
    from_queries = need_queries or (on_cpu and keys is None and need_scale)
    return (
        queries.new_empty(n if from_queries else 0, d, dtype=dtype if on_cpu else queries.dtype),
        queries.new_empty(keys.shape[0] if keys is not None and need_keys else 0, d),
        queries.new_empty((), dtype=dtype),
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
    return *_gradients(ctx, grad_loss, *ctx.saved_tensors[6:]), None, None


def _backward_both(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    return _gradients(ctx, grad_loss, *ctx.saved_tensors[6:])


def _backward_in_batch(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    queries, clusters, scale, count, stats, logits = ctx.saved_tensors
    grad_queries, grad_scale = torch.ops.wscl_fast.infonce_backward_in_batch(
        grad_loss, queries, clusters, scale, *ctx.options, count, stats, logits
    )
    need_queries, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        None,
        grad_scale if need_scale else None,
        *(None,) * 4,
    )


def _gradients(
    ctx: Any,
    grad_loss: Tensor,
    count: Tensor,
    stats: Tensor,
    direction: Tensor,
    key_direction: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass's first inputs, up to ``ignore_index``."""
    inputs = ctx.saved_tensors[:6]
    queries, scale = inputs[0], inputs[5]
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    in_place = need_queries and _is_last_use(direction)
    factor = None if key_direction is None else _common_factor(grad_loss, count)
    grad_queries, grad_keys, grad_scale = torch.ops.wscl_fast.infonce_backward(
        grad_loss,
        *inputs,
        *ctx.options,
        count,
        stats,
        direction,
        need_queries and not in_place,
        need_keys and factor is None,
        need_scale,
        allow_tf32(queries),
    )
    if in_place:  # what the kernel does, to the bit
        rows = torch.where(count > 0, grad_loss.double() * scale.double(), 0.0)
        grad_queries = direction.mul_(rows.to(direction.dtype)[:, None])
    if need_keys and key_direction is not None and factor is not None:
        if not _is_last_use(key_direction):
            grad_keys = key_direction * factor
        else:
            grad_keys = key_direction if factor == 1 else key_direction.mul_(factor)
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        grad_keys if need_keys else None,
        *(None,) * 3,
        grad_scale if need_scale else None,
        *(None,) * 3,
    )


def _common_factor(grad_loss: Tensor, count: Tensor) -> float | None:
    """What the gradient of the mean loss is to be multiplied by; None where no number will do, or where a
    second derivative may be asked for, which the operator refuses.
    """
    if torch.is_grad_enabled() or type(grad_loss) is not Tensor or not may_look(grad_loss):
        return None
    anchors = count > 0
    given = grad_loss[anchors]
    if not len(given):
        return 1.0
    first = given[0]
    if grad_loss.stride(0) != 0 and not bool((given == first).all()):
        return None
    factor = float(first) / float(torch.ones_like(first) / len(given))
    return factor if math.isfinite(factor) else None


def _is_last_use(direction: Tensor) -> bool:
    """Whether what was kept may become the gradient that it is but for factors.

    There are large ones, and this is the last backward pass to read them: their graph is not kept.
    """
    return (
        direction.numel() >= LARGE
        and direction.device.type == "cpu"
        and type(direction) is Tensor
        and not torch.compiler.is_compiling()
        and not _keeps_graph()
    )


def _keeps_graph() -> bool:
    """Whether the backward pass under way leaves its graph for another; yes, where PyTorch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # no public name has it
    return ask is None or bool(ask())


register("infonce_forward", _fake_forward, _backward, tensors=6, options=3)
register("infonce_forward_both", _fake_forward_both, _backward_both, tensors=6, options=3)
register_backward("infonce_backward", _fake_backward)
register("infonce_forward_in_batch", _fake_forward_in_batch, _backward_in_batch, tensors=3, options=3)
register_backward("infonce_backward_in_batch", _fake_backward_in_batch)
