"""Clustered InfoNCE over the batch of all ranks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.distributed import ring
from wscl_fast.distributed.collectives import Group, rank, rows_of_ranks, sum_over_ranks, world_size
from wscl_fast.distributed.collectives import gather as gather_rows
from wscl_fast.functional import Impl, Positives, Reduction
from wscl_fast.functional._checks import check_choice, check_matrix, check_vector
from wscl_fast.functional._inputs import scale_of
from wscl_fast.functional.infonce import infonce_rows

__all__ = ["Gather", "clustered_infonce", "reduce_over_ranks"]

Gather = Literal["all", "ring", "count"]


def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
    **options: Any,
) -> Tensor:
    """:func:`wscl_fast.functional.clustered_infonce` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        clustered_infonce(torch.cat(queries), torch.cat(keys), query_clusters=torch.cat(query_clusters), ...)

    Every rank gives its own rows and gets the same number: the loss of the whole batch, averaged over the
    anchors of *all* ranks. Its backward pass gives every rank the exact gradient of that number with respect
    to the rank's own tensors, what other ranks' queries ask of its keys included. Ranks may have different
    numbers of rows, none included; all must run forward and backward.

    What that means for parameters: each rank has the share of the gradient that came through its own rows,
    and the *sum* over the ranks is the gradient of one process. DistributedDataParallel takes the *mean*:
    pass ``ddp=True``, which multiplies the gradient (not the loss) by the number of ranks. The same holds
    for a temperature that is a parameter: have it inside a module that DistributedDataParallel wraps.

    Args:
        queries: ``[N, d]``, this rank's.
        keys: ``[M, d]``, this rank's. Without keys all ranks' queries are contrasted with each other.
        query_clusters: ``[N]`` int64, this rank's.
        key_clusters: ``[M]`` int64, this rank's; by default ``query_clusters``.
        temperature: as for one process; alike on all ranks.
        positives: as for one process.
        weights: ``[N]``, this rank's.
        ignore_index: as for one process.
        exclude_self: by default true where ``keys`` is not given. True: query i never meets key i of its own
            rank. A tensor ``[N]`` int64 gives each query's own key by its number among all ranks' keys in
            rank order (``gather="count"``: among this rank's), −1 for none.
        reduction: ``"mean"`` and ``"sum"`` over the anchors of all ranks; ``"none"`` gives this rank's rows.
        gather: how keys meet the other ranks' queries. ``"all"``: each rank gets all keys. ``"ring"``: keys
            travel from rank to rank while each computes, and no rank ever holds more than two blocks of
            them. ``"count"``: keys stay, each rank's are all that its queries meet (a queue that every rank
            holds whole); only the anchors are counted over all ranks.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.
        options: further arguments of the function for one process, but for ``return_stats``;
            ``gather="ring"`` takes only ``impl``. Sample ids must differ between ranks as samples do.

    Returns:
        0-dim tensor, the same on every rank; ``[N]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
    """
    check_choice("gather", gather, Gather)
    check_choice("reduction", reduction, Reduction)
    check_choice("positives", positives, Positives)
    check_choice("impl", options.get("impl", "auto"), Impl)
    if "return_stats" in options:
        raise ValueError("return_stats: not available over ranks; functional.clustered_infonce has it")
    size = world_size(group)
    if size == 1:
        gather = "count"
    if gather == "ring" and (unknown := set(options) - {"impl"}):
        raise ValueError(f"{min(unknown)}: not available with gather='ring'; gather='all' has it")
    if gather == "ring" and options.get("impl") == "reference":
        raise ValueError("impl: expected 'auto', 'fused' or 'chunked' with gather='ring', got 'reference'")
    local = _local(queries, keys, query_clusters, key_clusters, exclude_self, gather, group)
    if gather == "ring":
        rows, count = _ring(local, temperature, positives, ignore_index, options.get("impl", "auto"), group)
    else:
        options |= {"temperature": temperature, "positives": positives, "ignore_index": ignore_index}
        rows, count = _direct(local, gather == "all", group, options)
    return reduce_over_ranks(rows, count, weights, reduction, group, size if ddp else 1)


class _Local(NamedTuple):
    """The arguments of this rank, checked."""

    queries: Tensor
    keys: Tensor | None
    query_clusters: Tensor
    key_clusters: Tensor
    own: Tensor | None  # among all the keys that a query meets


def _local(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    exclude_self: bool | Tensor | None,
    gather: Gather,
    group: Group,
) -> _Local:
    check_matrix("queries", queries)
    check_vector("query_clusters", query_clusters, len(queries), queries, integer=True)
    if keys is None:
        if key_clusters is not None:
            raise ValueError("key_clusters: expected None where keys is None, got a tensor")
        key_clusters = query_clusters
    else:
        check_matrix("keys", keys)
        key_clusters = query_clusters if key_clusters is None else key_clusters
        check_vector("key_clusters", key_clusters, len(keys), queries, integer=True)
    own = keys is None if exclude_self is None else exclude_self
    if isinstance(own, Tensor):
        check_vector("exclude_self", own, len(queries), queries, integer=True)
    elif not isinstance(own, bool):
        raise TypeError(f"exclude_self: expected a bool or a tensor, got {type(own).__name__}")
    elif own:
        n, m = len(queries), len(key_clusters)
        if m < n:
            raise ValueError(f"exclude_self: expected a key for each of the {n} queries, got {m} keys")
        rows = [] if gather == "count" else rows_of_ranks(key_clusters, group)[0]
        own = torch.arange(n, device=queries.device) + sum(rows[: rank(group)])
    return _Local(queries, keys, query_clusters, key_clusters, own if isinstance(own, Tensor) else None)


def _direct(local: _Local, gathered: bool, group: Group, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rows and counts where the keys to be met lie in one tensor."""
    queries, keys, query_clusters, key_clusters, own = local
    if gathered:
        keys = gather_rows(queries if keys is None else keys, group)
        key_clusters = gather_rows(key_clusters, group)
        if (samples := options.get("query_samples")) is not None:
            key_samples = options.get("key_samples")
            options["key_samples"] = gather_rows(samples if key_samples is None else key_samples, group)
    exclude = own is not None if keys is None or own is None else own
    rows = infonce_rows(
        queries,
        keys,
        query_clusters=query_clusters,
        key_clusters=None if keys is None else key_clusters,
        exclude_self=exclude,
        **options,
    )
    return rows.loss, rows.positives


def _ring(
    local: _Local,
    temperature: float | Tensor,
    positives: Positives,
    ignore_index: int,
    impl: Impl,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """Rows and counts where the keys travel."""
    queries, keys, query_clusters, key_clusters, own = local
    keys = queries if keys is None else keys
    with torch.autocast(queries.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
        return ring.clustered_infonce(
            queries.to(dtype),
            keys,
            query_clusters,
            key_clusters,
            own,
            scale_of(temperature, queries, dtype),
            inner=positives == "in",
            ignore_index=ignore_index,
            fused=impl == "fused" or (impl == "auto" and _ops.serves(queries.device, dtype)),
            group=group,
        )


def reduce_over_ranks(
    loss: Tensor, count: Tensor, weights: Tensor | None, reduction: Reduction, group: Group, factor: int
) -> Tensor:
    """Over the rows of all ranks; the gradient is that of this rank's share, times a factor."""
    if weights is not None:
        check_vector("weights", weights, len(loss), loss, integer=False)
        loss = loss * weights.to(loss.dtype)
    if reduction == "none":
        return _AllRanks.apply(loss, loss, factor)  # type: ignore[no-untyped-call,no-any-return]
    share = loss.sum()
    if reduction == "mean":
        anchors = (count > 0).double()
        total = sum_over_ranks((anchors if weights is None else anchors * weights.double()).sum(), group)
        share = share / torch.where(total == 0, 1.0, total).to(share.dtype)
    return _AllRanks.apply(share, sum_over_ranks(share, group), factor)  # type: ignore[no-untyped-call,no-any-return]


class _AllRanks(torch.autograd.Function):
    """The value of all ranks with the gradient of this rank's share, times a factor."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * grad, None, None
