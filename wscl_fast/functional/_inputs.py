"""From the arguments that every loss takes to the pairs that the passes read, and from rows to a result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.functional._checks import (
    check_all_finite,
    check_choice,
    check_device,
    check_divisor,
    check_id,
    check_matrix,
    check_positive,
    check_vector,
    refuse_func_grad,
    refuse_vmap,
)
from wscl_fast.functional._passes import Passes, in_blocks
from wscl_fast.pairs import Pairs, present
from wscl_fast.values import may_look

Impl = Literal["auto", "fused", "chunked", "reference"]
Reduction = _ops.Reduction


@dataclass(frozen=True)
class Batch:
    """What every loss is over, as it was given."""

    queries: Tensor
    keys: Tensor | None
    query_clusters: Tensor
    key_clusters: Tensor | None
    temperature: float | Tensor
    ignore_index: int = -1
    exclude_self: bool | Tensor | None = None


class Inputs(NamedTuple):
    """Checked arguments in the computation's dtype."""

    pairs: Pairs
    in_batch: bool  # the queries are the keys: what holds of one side holds of the other
    scale: Tensor  # 1 / temperature: 0-dim or [N]

    @property
    def lowest(self) -> Tensor:
        """Least logit of unit vectors."""
        return -self.scale

    def with_ids(self, query_ids: Tensor, key_ids: Tensor) -> Pairs:
        """The same vectors under other ids."""
        return self.pairs._replace(query_ids=query_ids.contiguous(), key_ids=key_ids.contiguous())


def check_inputs(batch: Batch, *, keep_halves: bool, keep_keys: Callable[[Tensor], bool]) -> Inputs:
    """Refuse what does not fit together; the rest as :class:`Pairs`, in float32 or float64.

    With ``keep_halves`` bfloat16 or float16 rows of one kind stay as they are, for kernels that read them.
    Where ``keep_keys`` says so of the keys, they do, for those who convert them block by block.
    """
    queries, keys, in_batch = batch.queries, batch.keys, batch.keys is None
    key_clusters = batch.key_clusters
    check_matrix("queries", queries)
    n = len(queries)
    check_vector("query_clusters", batch.query_clusters, n, queries, integer=True)
    if keys is None:
        if key_clusters is not None:
            raise ValueError("key_clusters: expected None where keys is None, got a tensor")
        keys = queries
    else:
        check_matrix("keys", keys)
        if keys.shape[1] != queries.shape[1]:
            raise ValueError(
                f"keys: expected {queries.shape[1]} columns as in queries, got shape {tuple(keys.shape)}"
            )
        check_device("keys", keys, queries)
    if key_clusters is None:
        if len(keys) != n:
            raise ValueError(
                f"key_clusters: needed where there are not as many keys ({len(keys)})"
                f" as queries ({n}), got None"
            )
        key_clusters = batch.query_clusters
    check_vector("key_clusters", key_clusters, len(keys), queries, integer=True)
    ignore_index = check_id("ignore_index", batch.ignore_index)
    own = _own_keys(batch.exclude_self, queries, keys, in_batch)
    dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    scale = of_rows = scale_of(batch.temperature, queries, dtype)
    if not keep_halves or scale.ndim or queries.dtype != keys.dtype:
        if in_batch or not keep_keys(keys):
            keys = keys.to(dtype)
        queries = keys if in_batch else queries.to(dtype)
    if scale.ndim:  # a scale for each row is a scaling of the rows
        if scale.requires_grad:
            queries = present(queries, batch.query_clusters, ignore_index)
        queries, scale, in_batch = queries * scale[:, None], scale.new_ones(()), False
    query_ids, key_ids = batch.query_clusters.contiguous(), key_clusters.contiguous()
    pairs = Pairs(queries, keys, query_ids, key_ids, own, scale, ignore_index)
    return Inputs(pairs, in_batch, of_rows)


def prepare(
    batch: Batch,
    impl: Impl,
    passes: Callable[[bool], Passes] = Passes,
    *,
    halves: bool = False,
    blocks: bool = True,
) -> tuple[Inputs, Impl, Passes]:
    """The checked inputs, the implementation that ``impl`` stands for, and who answers by it.

    ``halves`` says that the fused kernels, where they are chosen, read rows of half precision as they are;
    ``blocks`` that whoever answers is asked for all that is read of the keys, and may take them in blocks.
    """
    check_choice("impl", impl, Impl)
    check_matrix("queries", batch.queries)
    whole = passes(False).whole
    fused = whole and choose(impl, batch.queries) == "fused"

    def keep_keys(keys: Tensor) -> bool:
        return not whole or (fused and blocks and in_blocks(keys))

    inputs = check_inputs(batch, keep_halves=halves and fused, keep_keys=keep_keys)
    impl = choose(impl, inputs.pairs.queries)
    if impl != "reference":
        refuse_func_grad(impl, inputs.pairs.queries, inputs.pairs.keys, inputs.scale)
    return inputs, impl, passes(impl == "fused")


def no_autocast(rows: Tensor) -> AbstractContextManager[object]:
    """Within it products keep the dtype of their factors."""
    kind = rows.device.type  # entering autocast takes time, with which nothing changes where it is off
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def choose(impl: Impl, rows: Tensor) -> Impl:
    """What ``"auto"`` stands for, for rows of this device and dtype; the rest as it is."""
    if impl != "auto":
        return impl
    return "fused" if _ops.serves(rows.device, rows.dtype) else "chunked"


def reduce_rows(
    loss: Tensor, count: Tensor, weights: Tensor | None, reduction: Reduction, *, name: str = "weights"
) -> Tensor:
    """Rows ``[N]`` or ``[N, L]``, or their sum, to a result; means are over those with a positive."""
    loss, share = weighted_rows(loss, count, weights, name=name)
    if reduction == "none":
        return loss
    total = loss.sum(0) if loss.ndim else loss
    if reduction == "sum":
        return total
    size = share.sum(0)
    if weights is None:
        return total / size.clamp_(min=1)
    return total / torch.where(size == 0, torch.ones_like(size), size).to(total.dtype)


def weighted_rows(
    loss: Tensor, count: Tensor, weights: Tensor | None, *, name: str = "weights"
) -> tuple[Tensor, Tensor]:
    """The loss of every row by its weight, and the weight by which it counts in a mean."""
    anchors = count > 0
    if weights is None:
        return loss, anchors
    check_vector(name, weights, len(loss), loss, integer=False)
    weights = weights.to(loss.dtype).view(-1, *(1,) * (loss.ndim - 1))
    weights = torch.where(anchors, weights, 0.0)
    check_all_finite(name, weights)
    return loss * weights, weights


def row_ids(rows: Tensor, ignore_index: int, start: int = 0) -> Tensor:
    """Ids that tell rows from each other, counted from ``start``; none of them says "no cluster"."""
    ids = torch.arange(len(rows), device=rows.device) + start
    return ids + (ids >= ignore_index) if check_id("ignore_index", ignore_index) >= 0 else ids


def _own_keys(
    exclude_self: bool | Tensor | None, queries: Tensor, keys: Tensor, in_batch: bool
) -> Tensor | None:
    """The index of every query's own key, or None where nobody has one."""
    if exclude_self is None or isinstance(exclude_self, bool | np.bool_):
        if not (in_batch if exclude_self is None else exclude_self):
            return None
        if len(keys) < len(queries):
            raise ValueError(
                f"exclude_self: expected a key for each of the {len(queries)} queries, got {len(keys)} keys"
            )
        return torch.arange(len(queries), device=queries.device)
    if not isinstance(exclude_self, Tensor):
        raise TypeError(f"exclude_self: expected a bool or a tensor, got {type(exclude_self).__name__}")
    if in_batch:
        raise ValueError("exclude_self: expected a bool where keys is None, got a tensor")
    check_vector("exclude_self", exclude_self, len(queries), queries, integer=True)
    return exclude_self


def scale_of(temperature: float | Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / temperature as a tensor of the computation's dtype, 0-dim or one for each query."""
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (len(queries),)) or not temperature.is_floating_point():
            raise TypeError(
                "temperature: expected a number, or a floating-point tensor that is 0-dim or of shape"
                f" ({len(queries)},), got shape {tuple(temperature.shape)}, {temperature.dtype}"
            )
        refuse_vmap("temperature", temperature)
        check_device("temperature", temperature, queries)
        if may_look(temperature) and temperature.numel():
            check_divisor("temperature", temperature.detach().amin().item(), dtype=dtype)
            check_positive("temperature", temperature.detach().amax().item())
        return 1 / temperature.to(dtype)
    scale = 1 / check_divisor("temperature", temperature, "a number or a tensor", dtype)
    return torch.full((), scale, dtype=dtype, device=queries.device)
