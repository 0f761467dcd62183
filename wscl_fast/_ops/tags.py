"""Sums weighed by common tags; what the operator computes is said in ``csrc/core/tags.h``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wscl_fast._ops.extension import extension, require
from wscl_fast._ops.registration import register_fake


def tag_weighted_sum(
    row_tags: Tensor,  # [N, words] int64
    column_tags: Tensor,  # [M, words] int64
    values: Tensor,  # [M, d] float32 or float64
    *,
    jaccard: bool,
) -> tuple[Tensor, Tensor]:
    """``W @ values`` ``[N, d]`` and ``W.sum(1)`` ``[N]`` float64, differentiable in the values, at any order.

    W is 1 where a row's and a column's tag set have a tag in common, else 0, or their Jaccard index. It is
    never there as a whole: bits are counted tile by tile.
    """
    require(values.device, values.dtype, "tag_weighted_sum")
    sums, totals = torch.ops.wscl_fast.tag_weighted_sum(row_tags, column_tags, values, jaccard)
    return cast(Tensor, sums), cast(Tensor, totals)


def _fake(row_tags: Tensor, column_tags: Tensor, values: Tensor, jaccard: bool) -> tuple[Tensor, Tensor]:
    n = row_tags.shape[0]
    return values.new_empty(n, values.shape[1]), values.new_empty(n, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    row_tags, column_tags, _, ctx.jaccard = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(row_tags, column_tags)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[2]:
        return (None,) * 4
    row_tags, column_tags = ctx.saved_tensors
    # The sum is linear, and its weights are the same seen from the other side.
    back, _ = torch.ops.wscl_fast.tag_weighted_sum(column_tags, row_tags, grad, ctx.jaccard)
    return None, None, back, None


if extension is not None:
    register_fake("tag_weighted_sum", _fake)
    torch.library.register_autograd("wscl_fast::tag_weighted_sum", _backward, setup_context=_setup_context)
