"""What every loss over the batch of all ranks has in common: how keys meet queries, and the average."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from wscl_fast.distributed.collectives import (
    Group,
    alone,
    gather,
    largest_over_ranks,
    rank,
    rows_of_ranks,
    sum_over_ranks,
    world_size,
)
from wscl_fast.distributed.ring import Ring
from wscl_fast.functional import Impl, Reduction
from wscl_fast.functional._checks import check_bool, check_choice, check_matrix, check_vector
from wscl_fast.functional._inputs import Batch, weighted_rows
from wscl_fast.functional._passes import Passes

__all__ = ["Gather", "Shared", "common"]

Gather = Literal["all", "ring", "count"]


@dataclass(frozen=True)
class Shared:
    """How the ranks share one loss; the arguments that every such loss takes, checked."""

    gather: Gather
    group: Group
    ddp: bool
    reduction: Reduction
    impl: Impl
    keys: str = "keys"  # what errors call them

    def __post_init__(self) -> None:
        check_choice("gather", self.gather, Gather)
        check_choice("reduction", self.reduction, Reduction)
        check_choice("impl", self.impl, Impl)
        check_bool("ddp", self.ddp)

    @property
    def way(self) -> Gather:
        """How keys are gathered; one process alone has them, and the definition is of all of them at once."""
        if alone(self.group):
            return "count"
        return "all" if self.gather == "ring" and self.impl == "reference" else self.gather

    def passes(self, fused: bool) -> Passes:
        """Who answers what the loss asks of the pairs."""
        return Ring(fused, self.group, self.keys) if self.way == "ring" else _Counted(fused, self.group)

    def meet(self, batch: Batch, **of_keys: Tensor | None) -> tuple[Batch, list[Tensor | None]]:
        """A rank's own batch, and what else has a row for each of its keys, as the loss's passes want them.

        Where all keys come together, those of all ranks; in any case with own keys numbered as the passes
        count them.
        """
        check_matrix("queries", batch.queries)
        _check_rows("query_clusters", batch.query_clusters, len(batch.queries))
        if batch.keys is None and batch.key_clusters is not None:
            raise ValueError("key_clusters: expected None where keys is None, got a tensor")
        if batch.keys is not None:
            check_matrix("keys", batch.keys)
        keys = batch.queries if batch.keys is None else batch.keys
        clusters = batch.query_clusters if batch.key_clusters is None else batch.key_clusters
        _check_rows("key_clusters", clusters, len(keys))
        if self.way == "count" and clusters.ndim > 1 and not alone(self.group):
            rows_of_ranks(clusters, self.group, "key_clusters")  # the sums have a place for each level
        own = self._own(batch, keys)
        if self.way == "count" and not (batch.keys is None and isinstance(batch.exclude_self, Tensor)):
            return batch, list(of_keys.values())
        columns: dict[str, Tensor | None] = {"key_clusters": clusters, **of_keys}
        if self.way == "all":
            name, prefix = ("queries", "query_") if batch.keys is None else (self.keys, "key_")
            keys = gather(keys, self.group, name)
            for column, value in columns.items():
                if value is not None:
                    columns[column] = gather(value, self.group, prefix + column.removeprefix("key_"))
        met = replace(batch, keys=keys, exclude_self=False if own is None else own)
        key_clusters, *others = columns.values()
        return replace(met, key_clusters=key_clusters), others

    def _own(self, batch: Batch, keys: Tensor) -> Tensor | None:
        """The number of every query's own key among all that it meets."""
        queries, own = batch.queries, batch.exclude_self
        own = batch.keys is None if own is None else own
        if isinstance(own, Tensor):
            check_vector("exclude_self", own, len(queries), queries, integer=True)
            return own
        if not isinstance(own, bool | np.bool_):
            raise TypeError(f"exclude_self: expected a bool or a tensor, got {type(own).__name__}")
        if not own:
            return None
        n, m = len(queries), len(keys)
        if m < n:
            raise ValueError(f"exclude_self: expected a key for each of the {n} queries, got {m} keys")
        name = "queries" if batch.keys is None else self.keys
        rows = [] if self.way == "count" else rows_of_ranks(keys.detach(), self.group, name)[0]
        return torch.arange(n, device=queries.device) + sum(rows[: rank(self.group)])

    def reduce(self, loss: Tensor, count: Tensor, weights: Tensor | None, *, name: str = "weights") -> Tensor:
        """Over the rows ``[N]`` or ``[N, L]`` of all ranks, or their sums.

        The gradient is that of this rank's share, times the number of ranks for DistributedDataParallel.
        """
        factor = world_size(self.group) if self.ddp else 1
        loss, share = weighted_rows(loss, count, weights, name=name)
        if self.reduction == "none":
            return _AllRanks.apply(loss, loss, factor)  # type: ignore[no-untyped-call,no-any-return]
        total, own = loss.sum(0), share.double().sum(0)
        # Both in one message, and in double precision: whatever a rank computes in, it can be told so.
        value, size = sum_over_ranks(torch.stack([total.double(), own]), self.group).unbind()
        if self.reduction == "mean":
            found = torch.where(size == 0, 1.0, size)
            value, total = value / found, total / found.to(total.dtype)
            if own.requires_grad:  # as weights do, which are in the mean's denominator too
                fall = torch.where(size == 0, 0.0, value) / found
                total = _ShareOfMean.apply(total, own, fall)  # type: ignore[no-untyped-call]
        value = value.to(total.dtype)
        return _AllRanks.apply(total, value, factor)  # type: ignore[no-untyped-call,no-any-return]


class _Counted(Passes):
    """All keys are here, other ranks' queries are not."""

    def __init__(self, fused: bool, group: Group) -> None:
        super().__init__(fused)
        self.group = group

    def largest(self, values: Tensor) -> Tensor:
        return largest_over_ranks(values, self.group)


def common(value: Tensor, reduction: Reduction, group: Group, *, ddp: bool) -> Tensor:
    """What all ranks have alike and multiply their loss by, with this rank's share of its gradient.

    Once it is reduced the loss is the same number on every rank, and so would be the gradient of what it is
    multiplied by: each gets an equal part. Of rows that are not reduced each rank has its own.
    """
    if not value.requires_grad:
        return value
    size = world_size(group)
    factor = (1 if reduction == "none" else 1 / size) * (size if ddp else 1)
    return _AllRanks.apply(value, value, factor)  # type: ignore[no-untyped-call,no-any-return]


def _check_rows(name: str, value: object, rows: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.ndim == 0 or len(value) != rows:
        raise ValueError(f"{name}: expected {rows} rows, got shape {tuple(value.shape)}")


class _AllRanks(torch.autograd.Function):
    """The value of all ranks with the gradient of this rank's share, times a factor."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * grad, None, None


class _ShareOfMean(torch.autograd.Function):
    """A rank's share of a mean, with the gradient of the share ``own`` that it has in the denominator.

    ``fall`` is how much the mean falls for each unit of it. It hangs on all ranks' rows, which are not here
    for a derivative of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, own: Tensor, fall: Tensor) -> Tensor:
        ctx.save_for_backward(total, own, fall)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        total, own, fall = ctx.saved_tensors
        return grad, _Once.apply(total, own, -fall * grad), None  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A gradient that hangs on these tensors and has none of its own."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, own: Tensor, made: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            "weights: the gradient of a mean over ranks with respect to weights has no derivative;"
            " reduction='sum' has"
        )
