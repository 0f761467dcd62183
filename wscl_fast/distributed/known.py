"""The losses that know more of a sample than one cluster, over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wscl_fast.distributed.collectives import Group
from wscl_fast.distributed.shared import Gather, Shared, common
from wscl_fast.functional import Affinity, Constraint, Impl, Positives, Reduction
from wscl_fast.functional._inputs import Batch
from wscl_fast.functional.hierarchical import Levels, hierarchical_rows
from wscl_fast.functional.soft import Auxiliary, soft_rows

__all__ = ["hierarchical_infonce", "soft_infonce"]


def hierarchical_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    level_weights: Sequence[float] | Tensor | None = None,
    constraint: Constraint = "none",
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
) -> Tensor:
    """:func:`wscl_fast.functional.hierarchical_infonce` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        hierarchical_infonce(torch.cat(queries), query_clusters=torch.cat(query_clusters), ...)

    Every rank gives its own rows; the number and the gradient that it gets, and ``exclude_self``, ``gather``,
    ``group`` and ``ddp``, are as in :func:`wscl_fast.distributed.clustered_infonce`. On a ring keys go round
    once, with ``constraint="pair"`` three times. The constraints hold between the levels' means, and the
    pairs, of all ranks. The number of levels, ``level_weights`` and a temperature that is not ``[N]`` are
    alike on all of them, and the gradients that ranks get of ``level_weights`` sum to that of one process.

    Args:
        queries: ``[N, d]``, this rank's.
        keys: ``[M, d]``, this rank's. Without keys all ranks' queries are contrasted with each other.
        query_clusters: ``[N, L]`` int64, this rank's, the coarsest level first.
        key_clusters: ``[M, L]`` int64, this rank's; by default ``query_clusters``.
        level_weights: as for one process.
        constraint: as for one process.
        temperature: as for one process; ``[N]``: this rank's.
        positives: as for one process.
        weights: ``[N]``, this rank's.
        ignore_index: as for one process.
        exclude_self: as in :func:`wscl_fast.distributed.clustered_infonce`.
        reduction: ``"mean"`` and ``"sum"`` over the rows of all ranks; ``"none"`` gives this rank's.
        impl: as for one process.
        gather: how keys meet the other ranks' queries, as in
            :func:`wscl_fast.distributed.clustered_infonce`.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.

    Returns:
        0-dim tensor, the same on every rank; ``[N, L]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
        ValueError: on all ranks, where their rows differ in dtype or size.
    """
    shared = Shared(gather, group, ddp, reduction, impl)
    levels = Levels(positives, constraint, level_weights)
    levels.check(query_clusters, key_clusters, reduction)
    batch = Batch(queries, keys, query_clusters, key_clusters, temperature, ignore_index, exclude_self)
    batch, _ = shared.meet(batch)
    loss, count = hierarchical_rows(batch, levels, reduction, impl=impl, passes=shared.passes)
    if isinstance(level_weights, Tensor):
        levels = replace(levels, weights=common(level_weights, reduction, group, ddp=ddp))
    return levels.together(shared.reduce(loss, count, weights), reduction)


def soft_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_auxiliary: Tensor,
    key_auxiliary: Tensor | None = None,
    affinity: Affinity,
    key_valid: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    weights: Tensor | None = None,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
) -> Tensor:
    """:func:`wscl_fast.functional.soft_infonce` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        soft_infonce(torch.cat(queries), query_auxiliary=torch.cat(query_auxiliary), affinity=affinity, ...)

    Every rank gives its own rows; the number and the gradient that it gets, and ``exclude_self``, ``gather``,
    ``group`` and ``ddp``, are as in :func:`wscl_fast.distributed.clustered_infonce`.
    ``key_valid`` is given on every rank or on none; words of tags, or an auxiliary vector's length and dtype,
    and a temperature that is not ``[N]`` are alike on all of them.

    Args:
        queries: ``[N, d]``, this rank's.
        keys: ``[M, d]``, this rank's. Without keys all ranks' queries are contrasted with each other.
        query_auxiliary: tag masks or vectors of this rank's queries.
        key_auxiliary: of this rank's keys; by default ``query_auxiliary``.
        affinity: as for one process.
        key_valid: ``[M]`` bool, this rank's.
        temperature: as for one process; ``[N]``: this rank's.
        positives: as for one process.
        weights: ``[N]``, this rank's.
        exclude_self: as in :func:`wscl_fast.distributed.clustered_infonce`.
        reduction: ``"mean"`` and ``"sum"`` over the rows of all ranks; ``"none"`` gives this rank's.
        impl: as for one process.
        gather: how keys meet the other ranks' queries, as in
            :func:`wscl_fast.distributed.clustered_infonce`.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.

    Returns:
        0-dim tensor, the same on every rank; ``[N]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
        ValueError: on all ranks, where their rows differ in dtype or size.
    """
    shared = Shared(gather, group, ddp, reduction, impl)
    known = Auxiliary(affinity, query_auxiliary, key_auxiliary, key_valid).checked(queries, keys)
    assert known.of_keys is not None
    ids, key_ids = (
        torch.zeros(len(side), dtype=torch.int64, device=side.device)
        for side in (known.of_queries, known.of_keys)
    )
    batch = Batch(queries, keys, ids, None if keys is None else key_ids, temperature, -1, exclude_self)
    batch, (of_keys, valid) = shared.meet(batch, key_auxiliary=known.of_keys, key_valid=key_valid)
    known = replace(known, of_keys=of_keys, key_valid=valid)
    loss, count = soft_rows(
        queries,
        batch.keys,
        known,
        temperature,
        batch.exclude_self,
        positives,
        impl=impl,
        passes=shared.passes,
    )
    return shared.reduce(loss, count, weights)
