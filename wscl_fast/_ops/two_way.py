"""The log-sum-exps of both directions of one similarity matrix; see ``csrc/core/two_way.h``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wscl_fast._ops.extension import allow_tf32, compute_dtype, require
from wscl_fast._ops.logsumexp import arguments
from wscl_fast._ops.registration import register, register_backward
from wscl_fast._ops.room import room_for_logits
from wscl_fast.pairs import Meets, Pairs


def two_way_logsumexp(pairs: Pairs, meets: Meets = "all") -> tuple[Tensor, Tensor]:
    """``[N]`` and ``[M]``: log Σ e^{scale · q·k} over the keys that each query meets, and over the queries
    that meet each key; both differentiable.

    In plain PyTorch::

        S = (pairs.scale * pairs.queries @ pairs.keys.T).masked_fill(~pairs.tile(meets), -inf)
        rows, columns = S.logsumexp(1), S.logsumexp(0)

    Rows, ids and own keys are as in :func:`logsumexp`. A row or column that meets nothing has −∞ and passes
    no gradient on, whatever comes from above.

    One similarity matrix serves both directions: 1 GEMM forward; with the gradients of queries, keys and
    scale 4 in all, or 3 where there is room for the logits (:mod:`wscl_fast._ops.room`); with those of one
    side 3.
    """
    require(pairs.queries.device, pairs.queries.dtype)
    both = pairs.queries.requires_grad and pairs.keys.requires_grad
    if both and (room := room_for_logits(pairs.queries, pairs.keys)):
        rows, columns, _, _, _ = _forward_with_room_op(*arguments(pairs, meets), room)
        return cast(Tensor, rows), cast(Tensor, columns)
    rows, columns, _, _ = _forward_op(*arguments(pairs, meets), allow_tf32(pairs.queries))
    return cast(Tensor, rows), cast(Tensor, columns)


def two_way_block(pairs: Pairs, meets: Meets = "all") -> tuple[Tensor, Tensor]:
    """The forward pass over one of several blocks of keys, without autograd: the statistics of rows and of
    columns, ``[2, N]`` and ``[2, M]`` float64, which :func:`wscl_fast._ops.merge_blocks` merges. One GEMM.
    """
    require(pairs.queries.device, pairs.queries.dtype)
    with torch.no_grad():
        _, _, rows, columns = _forward_op(*arguments(pairs, meets), allow_tf32(pairs.queries))
    return rows, columns


def two_way_block_backward(
    grad_rows: Tensor,  # [N], of the merged log-sum-exps
    grad_columns: Tensor,  # [M]
    pairs: Pairs,
    row_stats: Tensor,  # [2, N] merged over all blocks of keys
    column_stats: Tensor,  # [2, M] merged over all queries that met the block
    meets: Meets = "all",
) -> tuple[Tensor, Tensor]:
    """A block's part of the gradients ``[N, d]`` of the queries, and ``[M, d]`` of its keys. Three GEMMs."""
    require(pairs.queries.device, pairs.queries.dtype)
    with torch.no_grad():
        grad_queries, grad_keys = _backward_op(
            grad_rows,
            grad_columns,
            *arguments(pairs, meets),
            row_stats,
            column_stats,
            True,
            True,
            allow_tf32(pairs.queries),
        )
    return grad_queries, grad_keys


def _fake_forward(queries: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m, dtype = queries.shape[0], keys.shape[0], compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(m, dtype=dtype),
        queries.new_empty(2, n, dtype=torch.float64),
        queries.new_empty(2, m, dtype=torch.float64),
    )


def _fake_forward_with_room(queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, room = rest
    return *_fake_forward(queries, keys), queries.new_empty(room, dtype=compute_dtype(queries.dtype))


def _fake_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    meets: int,
    ignore_index: int,
    row_stats: Tensor,
    column_stats: Tensor,
    need_queries: bool,
    need_keys: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype, d = compute_dtype(queries.dtype), queries.shape[1]
    return (
        queries.new_empty(queries.shape[0] if need_queries else 0, d, dtype=dtype),
        queries.new_empty(keys.shape[0] if need_keys else 0, d, dtype=dtype),
    )


def _fake_backward_with_room(
    grad_rows: Tensor, grad_columns: Tensor, queries: Tensor, keys: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(queries.dtype)
    return queries.new_empty(queries.shape, dtype=dtype), queries.new_empty(keys.shape, dtype=dtype)


def _backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    # The scale's gradient is read off that of the queries, or of the keys where it stands alone.
    through_queries = need_queries or (need_scale and not need_keys)
    *inputs, row_stats, column_stats = ctx.saved_tensors
    grad_queries, grad_keys = _backward_op(
        grad_rows,
        grad_columns,
        *inputs,
        *ctx.options,
        row_stats,
        column_stats,
        through_queries,
        need_keys,
        allow_tf32(inputs[0]),
    )
    return *_gradients(ctx, inputs, grad_queries, grad_keys, through_queries), None


def _backward_with_room(
    ctx: Any, grad_rows: Tensor, grad_columns: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    *inputs, row_stats, column_stats, logits = ctx.saved_tensors
    grad_queries, grad_keys = _backward_with_room_op(
        grad_rows, grad_columns, *inputs, *ctx.options, row_stats, column_stats, logits
    )
    return *_gradients(ctx, inputs, grad_queries, grad_keys, True), None


def _gradients(
    ctx: Any, inputs: list[Tensor], grad_queries: Tensor, grad_keys: Tensor, through_queries: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass's inputs up to ``ignore_index``."""
    queries, keys, scale = inputs[0], inputs[1], inputs[5]
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    grad_scale = None
    if need_scale:
        vectors, gradient = (queries, grad_queries) if through_queries else (keys, grad_keys)
        products = torch.where(
            gradient == 0, 0.0, vectors * gradient
        )  # whatever stands in rows without an id
        grad_scale = products.sum() / scale
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        grad_keys.to(keys.dtype) if need_keys else None,
        *(None,) * 3,
        grad_scale,
        *(None,) * 2,
    )


_forward_op = register("two_way_logsumexp", _fake_forward, _backward, tensors=6, options=2, results=2)
_backward_op = register_backward("two_way_logsumexp_backward", _fake_backward)
_forward_with_room_op = register(
    "two_way_logsumexp_with_room",
    _fake_forward_with_room,
    _backward_with_room,
    tensors=6,
    options=2,
    results=2,
)
_backward_with_room_op = register_backward("two_way_logsumexp_with_room_backward", _fake_backward_with_room)
