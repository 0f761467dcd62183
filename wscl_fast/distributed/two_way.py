"""The losses of CLIP and SigLIP over the pairs of all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from wscl_fast.distributed.both_ways import both_ways
from wscl_fast.distributed.collectives import Group, alone, first_row
from wscl_fast.distributed.shared import Gather, Shared
from wscl_fast.functional import Impl, Positives, Reduction
from wscl_fast.functional import clip_loss as clip_of_one_process
from wscl_fast.functional._checks import check_choice
from wscl_fast.functional._inputs import Batch, no_autocast, prepare, row_ids
from wscl_fast.functional._variant import Variant
from wscl_fast.functional.infonce import infonce_rows
from wscl_fast.functional.two_way import check_sides, check_weights, clip_rows, siglip_rows

__all__ = ["clip_loss", "siglip_loss"]


def clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    x_clusters: Tensor | None = None,
    y_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    positives: Positives = "out",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    gather: Literal["all", "ring"] = "all",
    group: Group = None,
    ddp: bool = False,
) -> Tensor:
    """:func:`wscl_fast.functional.clip_loss` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        clip_loss(torch.cat(x), torch.cat(y), x_clusters=torch.cat(x_clusters), ...)

    Every rank gives its own rows of both sides; the number and the gradient that it gets, ``group`` and
    ``ddp`` are as in :func:`wscl_fast.distributed.clustered_infonce`. Without ids row i of a rank belongs to
    row i of the same rank. With ``gather="all"`` each rank gets all rows of either side, and its own meet
    them: two matrices of similarities. ``gather="ring"`` sends the rows of y round, and one matrix serves
    both directions: half of the products, in one trip. The temperature is one number, alike on all ranks.

    Args:
        x: ``[N, d]``, this rank's.
        y: ``[M, d]``, this rank's.
        x_clusters: ``[N]`` int64, this rank's; by default row i belongs to this rank's row i of ``y``.
        y_clusters: ``[M]`` int64, this rank's; by default ``x_clusters``.
        temperature: as for one process.
        positives: as for one process.
        x_weights: ``[N]``, this rank's.
        y_weights: ``[M]``, this rank's.
        ignore_index: as for one process.
        reduction: ``"mean"`` and ``"sum"`` over the rows of all ranks; ``"none"`` gives this rank's.
        impl: as for one process.
        gather: ``"all"`` or ``"ring"``.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.

    Returns:
        0-dim tensor, the same on every rank; for ``reduction="none"`` this rank's rows of x, then those of y.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
        ValueError: on all ranks, where their rows differ in dtype or size.
    """
    check_choice("gather", gather, Literal["all", "ring"])
    shared = Shared(gather, group, ddp, reduction, impl, keys="y")
    if alone(group):
        return clip_of_one_process(
            x,
            y,
            x_clusters=x_clusters,
            y_clusters=y_clusters,
            temperature=temperature,
            positives=positives,
            x_weights=x_weights,
            y_weights=y_weights,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=impl,
        )
    variant = Variant(positives)
    if isinstance(temperature, Tensor) and temperature.ndim:
        raise TypeError(f"temperature: expected a number or a 0-dim tensor, got shape {temperature.shape}")
    check_weights(x, y, x_weights, y_weights)
    x_clusters, y_clusters = _ids(x, y, x_clusters, y_clusters, ignore_index, group)
    batch, _ = shared.meet(Batch(x, y, x_clusters, y_clusters, temperature, ignore_index))
    if shared.way == "ring":
        inputs, impl, answers = prepare(batch, impl, shared.passes)
        with no_autocast(x):
            sides = both_ways(inputs.pairs.folded(), variant.inner, fused=answers.fused, group=group)
            rows = []
            for side in sides:
                own = side.logits if side.own_kind is None else side.own_kind
                rows.append((clip_rows(side.lse, own, side.positives, variant.inner), side.positives))
    else:
        other = Batch(y, x, y_clusters, x_clusters, temperature, ignore_index)
        other, _ = replace(shared, keys="x").meet(other)
        of_sides = [infonce_rows(side, variant, impl=impl, passes=shared.passes) for side in (batch, other)]
        rows = [(of_side.loss, of_side.positives) for of_side in of_sides]
    losses = [
        shared.reduce(*side, weights, name=name)
        for side, name, weights in zip(rows, ("x_weights", "y_weights"), (x_weights, y_weights), strict=True)
    ]
    return torch.cat(losses) if reduction == "none" else (losses[0] + losses[1]) / 2


def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    x_clusters: Tensor | None = None,
    y_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
) -> Tensor:
    """:func:`wscl_fast.functional.siglip_loss` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        siglip_loss(torch.cat(x), torch.cat(y), x_clusters=torch.cat(x_clusters), ...)

    Every rank gives its own rows of both sides; the number and the gradient that it gets, and ``gather`` (of
    the rows of ``y``), ``group`` and ``ddp``, are as in :func:`wscl_fast.distributed.clustered_infonce`.
    Without ids row i of a rank belongs to row i of the same rank. The bias, and a temperature that is not
    ``[N]``, are alike on all ranks.

    Args:
        x: ``[N, d]``, this rank's.
        y: ``[M, d]``, this rank's.
        x_clusters: ``[N]`` int64, this rank's; by default row i belongs to this rank's row i of ``y``.
        y_clusters: ``[M]`` int64, this rank's; by default ``x_clusters``.
        temperature: as for one process; ``[N]``: this rank's.
        bias: as for one process.
        weights: ``[N]``, this rank's.
        ignore_index: as for one process.
        reduction: ``"mean"`` and ``"sum"`` over the rows of ``x`` of all ranks; ``"none"`` gives this rank's.
        impl: as for one process.
        gather: how the rows of ``y`` meet the other ranks' ``x``, as in
            :func:`wscl_fast.distributed.clustered_infonce`.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.

    Returns:
        0-dim tensor, the same on every rank; ``[N]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
        ValueError: on all ranks, where their rows differ in dtype or size.
    """
    shared = Shared(gather, group, ddp, reduction, impl, keys="y")
    x_clusters, y_clusters = _ids(x, y, x_clusters, y_clusters, ignore_index, group)
    batch, _ = shared.meet(Batch(x, y, x_clusters, y_clusters, temperature, ignore_index))
    loss, has_id = siglip_rows(batch, bias, impl=impl, passes=shared.passes)
    return shared.reduce(loss, has_id, weights)


def _ids(
    x: Tensor,
    y: Tensor,
    x_clusters: Tensor | None,
    y_clusters: Tensor | None,
    ignore_index: int,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """The ids of both sides, which fit; without any, row i of a rank belongs to row i of the same rank."""
    of_sides = check_sides(x, y, x_clusters, y_clusters, ignore_index)
    if x_clusters is not None:
        return of_sides
    ids = row_ids(x, ignore_index, first_row(x, group, "x"))
    return ids, ids
