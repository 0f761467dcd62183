"""The log-sum-exps of both directions of one similarity matrix; see ``csrc/core/two_way.h``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wscl_fast._ops.extension import compute_dtype, extension, require
from wscl_fast._ops.logsumexp import MEETS, Meets


def two_way_logsumexp(
    queries: Tensor,  # [N, d]
    keys: Tensor,  # [M, d]
    query_ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    own: Tensor | None,  # [N] int64: the key that row i never meets, outside [0, M) for none
    scale: Tensor,  # 0-dim, 1 / temperature
    *,
    meets: Meets = "all",
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """``[N]`` and ``[M]``: log Σ e^{scale · q·k} over the keys that each query meets, and over the queries
    that meet each key; both differentiable.

    In plain PyTorch::

        S = (scale * queries @ keys.T).masked_fill(~met, -inf)
        rows, columns = S.logsumexp(1), S.logsumexp(0)

    Who meets whom is said as in :func:`logsumexp`. A row or column that meets nothing has −∞ and passes no
    gradient on, whatever comes from above. Rows are float32, float64, bfloat16 or float16; halves are
    computed with in float32, in which the results are returned and ``scale`` expected.

    One similarity matrix serves both directions: 1 GEMM forward; with the gradients of queries, keys and
    scale 4 in all, with those of one side 3.
    """
    require(queries.device, queries.dtype)
    rows, columns, _, _ = torch.ops.wscl_fast.two_way_logsumexp(
        queries, keys, query_ids, key_ids, own, scale, MEETS[meets], ignore_index
    )
    return cast(Tensor, rows), cast(Tensor, columns)


def _fake_forward(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    own: Tensor | None,
    scale: Tensor,
    meets: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m, dtype = queries.shape[0], keys.shape[0], compute_dtype(queries.dtype)
    return (
        queries.new_empty(n, dtype=dtype),
        queries.new_empty(m, dtype=dtype),
        queries.new_empty(2, n, dtype=torch.float64),
        queries.new_empty(2, m, dtype=torch.float64),
    )


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
) -> tuple[Tensor, Tensor]:
    dtype, d = compute_dtype(queries.dtype), queries.shape[1]
    return (
        queries.new_empty(queries.shape[0] if need_queries else 0, d, dtype=dtype),
        queries.new_empty(keys.shape[0] if need_keys else 0, d, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, meets, ignore_index = inputs
    _, _, row_stats, column_stats = output
    ctx.options = (meets, ignore_index)
    ctx.mark_non_differentiable(row_stats, column_stats)
    ctx.save_for_backward(*tensors, row_stats, column_stats)


def _backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, row_stats, column_stats = ctx.saved_tensors
    queries, keys, scale = inputs[0], inputs[1], inputs[5]
    need_queries, need_keys, need_scale = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    # The scale's gradient is read off that of the queries, or of the keys where it stands alone.
    through_queries = need_queries or (need_scale and not need_keys)
    grad_queries, grad_keys = torch.ops.wscl_fast.two_way_logsumexp_backward(
        grad_rows, grad_columns, *inputs, *ctx.options, row_stats, column_stats, through_queries, need_keys
    )
    grad_scale = None
    if need_scale:
        vectors, gradient = (queries, grad_queries) if through_queries else (keys, grad_keys)
        grad_scale = (vectors * gradient).sum() / scale
    return (
        grad_queries.to(queries.dtype) if need_queries else None,
        grad_keys.to(keys.dtype) if need_keys else None,
        *(None,) * 3,
        grad_scale,
        None,
        None,
    )


def _no_double_backward(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError("two_way_logsumexp: the fused kernels have no second derivative")


if extension is not None:
    torch.library.register_fake("wscl_fast::two_way_logsumexp", _fake_forward)
    torch.library.register_fake("wscl_fast::two_way_logsumexp_backward", _fake_backward)
    torch.library.register_autograd("wscl_fast::two_way_logsumexp", _backward, setup_context=_setup_context)
    torch.library.register_autograd("wscl_fast::two_way_logsumexp_backward", _no_double_backward)
