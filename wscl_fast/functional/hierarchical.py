"""Clustered InfoNCE over levels of clusters: one log-sum-exp, and a sum over clusters for each level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wscl_fast import reference
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import (
    LARGEST_FLOAT32,
    check_choice,
    check_id,
    check_range,
    check_tensor,
    refuse_vmap,
)
from wscl_fast.functional._inputs import Batch, Impl, Reduction, no_autocast, prepare, reduce_rows
from wscl_fast.functional._passes import Passes
from wscl_fast.functional._requests import (
    Count,
    InBatchLogSumExp,
    LargestPairLoss,
    LogitSum,
    LogSumExp,
    PairLosses,
    Request,
)
from wscl_fast.functional._variant import Positives
from wscl_fast.pairs import Pairs
from wscl_fast.values import may_look

__all__ = ["Constraint", "hierarchical_infonce"]

Constraint = Literal["none", "level", "pair"]


@takes_arrays
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
) -> Tensor:
    """Clustered InfoNCE with a column of cluster ids for each level, from the root down.

    In plain PyTorch, where every sample has an id at every level::

        losses = [clustered_infonce(queries, keys, query_clusters=ids) for ids in query_clusters.T]
        loss = (level_weights * torch.stack(losses)).sum()

    but the N × M part, the log-sum-exp, is computed once for all levels: what a level adds is a sum over its
    clusters. A key with an id at some level is in every query's denominator; a sample without an id at a
    level (``ignore_index``) has no positives there. Ids are compared within their level only, so they must
    name the whole path: two nodes of one level are two ids, whatever they are called.

    Args:
        queries: ``[N, d]``, as in :func:`wscl_fast.functional.clustered_infonce`.
        keys: ``[M, d]``. Without keys the queries are contrasted with each other, each without itself.
        query_clusters: ``[N, L]``, int64 cluster ids, the coarsest level first.
        key_clusters: ``[M, L]``; by default ``query_clusters``.
        level_weights: L numbers of at least 0; 1 / L each by default.
        constraint: that a coarse level's loss is not below a finer one's. ``"level"`` raises a level's loss
            to the largest of the finer levels', as the authors' code does; ``"pair"`` raises the loss of
            every positive pair to the largest of all pairs of the finer levels, as their equation says (for
            ``positives="out"``).
        temperature: positive number, or a tensor, 0-dim or ``[N]``.
        positives: ``"out"`` or ``"in"``.
        weights: ``[N]``, a weight for each query.
        ignore_index: the id that says "no cluster".
        exclude_self: as in ``clustered_infonce``.
        reduction: ``"mean"``: the sum over the levels of their means (over the queries that have a positive
            there); ``"sum"``; or ``"none"``: ``[N, L]``, weighted, not with ``constraint="level"``.
        impl: as in ``clustered_infonce``. The constraint between pairs runs in plain PyTorch, over pairs of
            one cluster only.

    Returns:
        0-dim tensor, or ``[N, L]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as ``clustered_infonce``.

    Source: Zhang et al., *Use All The Labels: A Hierarchical Multi-Label Contrastive Learning Framework*,
    CVPR 2022 (arXiv 2204.13207): HiMulCon with level weights, HiConE and HiMulConE with the constraint.
    """
    check_choice("reduction", reduction, Reduction)
    levels = Levels(positives, constraint, level_weights)
    batch = Batch(queries, keys, query_clusters, key_clusters, temperature, ignore_index, exclude_self)
    loss, count = hierarchical_rows(batch, levels, reduction, impl=impl)
    return levels.together(reduce_rows(loss, count, weights, reduction), reduction)


@dataclass(frozen=True)
class Levels:
    """What :func:`hierarchical_infonce` says of each of these, checked."""

    positives: Positives
    constraint: Constraint
    weights: Sequence[float] | Tensor | None

    def __post_init__(self) -> None:
        check_choice("positives", self.positives, Positives)
        check_choice("constraint", self.constraint, Constraint)
        if self.constraint == "pair" and self.positives == "in":
            raise ValueError("constraint: 'pair' needs a loss of each pair, got positives='in'")
        self._check_weights()

    def _check_weights(self) -> None:
        weights: object = self.weights
        if isinstance(weights, np.ndarray):
            weights = weights.tolist()
            object.__setattr__(self, "weights", weights)
        if isinstance(weights, Tensor):
            if weights.ndim != 1 or not weights.is_floating_point():
                raise TypeError(
                    "level_weights: expected a floating-point vector,"
                    f" got shape {tuple(weights.shape)}, {weights.dtype}"
                )
            refuse_vmap("level_weights", weights)
            if may_look(weights) and weights.numel():
                for extreme in (weights.detach().amin(), weights.detach().amax()):
                    check_range("level_weights", extreme.item(), 0, LARGEST_FLOAT32)
        elif weights is not None:
            if isinstance(weights, str) or not isinstance(weights, Sequence):
                raise TypeError(
                    f"level_weights: expected a sequence of numbers or a tensor, got {type(weights).__name__}"
                )
            floats = [check_range("level_weights", weight, 0, LARGEST_FLOAT32) for weight in weights]
            object.__setattr__(self, "weights", floats)

    def check(self, query_clusters: object, key_clusters: object, reduction: Reduction) -> None:
        """Refuse what does not fit to the levels."""
        if self.constraint == "level" and reduction == "none":
            raise ValueError("constraint: 'level' is one between means or sums, got reduction='none'")
        levels = check_levels("query_clusters", query_clusters)
        if key_clusters is not None and (got := check_levels("key_clusters", key_clusters)) != levels:
            raise ValueError(f"key_clusters: expected {levels} levels as in query_clusters, got {got}")
        if self.weights is not None and len(self.weights) != levels:
            raise ValueError(
                f"level_weights: expected {levels} numbers, one a level, got {len(self.weights)}"
            )

    def together(self, losses: Tensor, reduction: Reduction) -> Tensor:
        """The levels' losses ``[..., L]`` under the constraint between levels, by their weights, as one."""
        levels = losses.shape[-1]
        if self.constraint == "level":
            raised = [losses[-1]]
            for loss in losses[:-1].flip(0):
                raised.insert(0, torch.maximum(loss, raised[0]))
            losses = torch.stack(raised)
        if self.weights is None:
            weighted = losses / levels
        elif isinstance(self.weights, Tensor):
            weighted = losses * self.weights.to(losses)
        else:
            # Number by number: a tensor of them would be a copy that a GPU's host waits for.
            by_level = zip(losses.unbind(-1), self.weights, strict=True)
            weighted = torch.stack([loss * weight for loss, weight in by_level], -1)
        return weighted if reduction == "none" else weighted.sum(-1)


def hierarchical_rows(
    batch: Batch,  # with a column of clusters for each level
    levels: Levels,
    reduction: Reduction,
    *,
    impl: Impl = "auto",
    passes: Callable[[bool], Passes] = Passes,
) -> tuple[Tensor, Tensor]:
    """Loss and positives' count of every row and level, ``[N, L]``, neither weighted nor reduced."""
    levels.check(batch.query_clusters, batch.key_clusters, reduction)
    query_levels, ignored = batch.query_clusters, check_id("ignore_index", batch.ignore_index)
    key_levels = query_levels if batch.key_clusters is None else batch.key_clusters
    somewhere = replace(
        batch,
        query_clusters=_somewhere(query_levels, ignored),
        key_clusters=None if batch.key_clusters is None else _somewhere(key_levels, ignored),
    )
    inputs, impl, answers = prepare(somewhere, impl, passes)
    inner, by_pair = levels.positives == "in", levels.constraint == "pair"
    with no_autocast(batch.queries):
        of_level = [
            inputs.with_ids(*ids) for ids in zip(query_levels.unbind(1), key_levels.unbind(1), strict=True)
        ]
        if impl == "reference":
            rows = reference.hierarchical_infonce(
                inputs.pairs, of_level, inner=inner, by_pair=by_pair, largest=answers.largest
            )
        else:
            everyone = answers.folded(inputs.pairs)
            folded = [everyone._replace(query_ids=p.query_ids, key_ids=p.key_ids) for p in of_level]
            lse = InBatchLogSumExp(inputs.pairs) if inputs.in_batch else LogSumExp(everyone)
            rows = _rows(lse, folded, inner, by_pair, answers)
        losses, counts = zip(*rows, strict=True)
        return torch.stack(losses, 1), torch.stack(counts, 1)


def _rows(
    everyone: LogSumExp, levels: list[Pairs], inner: bool, by_pair: bool, passes: Passes
) -> list[tuple[Tensor, Tensor]]:
    """Loss and positives' count of every row, level by level."""
    wanted: dict[str, Request] = {"lse": everyone}
    for level, pairs in enumerate(levels):
        wanted[f"count {level}"] = Count(pairs)
        if not by_pair:
            wanted[f"{level}"] = LogSumExp(pairs, "same") if inner else LogitSum(pairs)
    got = passes(wanted)
    lse = got["lse"].masked_fill(got["lse"] == -torch.inf, 0)
    if by_pair:
        got |= _pair_losses(levels, lse, passes)
    rows = []
    for level in range(len(levels)):
        count = got[f"count {level}"]
        size, value = count.clamp(min=1).to(lse.dtype), got[f"{level}"]
        if by_pair:
            loss = value / size
        elif inner:
            loss = lse - value.masked_fill(count == 0, 0) + size.log()
        else:
            loss = lse - value / size
        rows.append((torch.where(count > 0, loss, 0.0), count))
    return rows


def _pair_losses(levels: list[Pairs], lse: Tensor, passes: Passes) -> dict[str, Tensor]:
    """The sum of every row's pair losses at each level, none below the largest of all finer levels' pairs."""
    nothing = lse.new_full((1,), -torch.inf)
    floors = [nothing[0]]  # of the finest level, then of the next coarser one
    if len(levels) > 1:
        largest = passes({f"{level}": LargestPairLoss(p, lse) for level, p in enumerate(levels) if level})
        # Rows or none, the value hangs on them: on every process the same passes have a gradient.
        of_levels = [torch.cat([terms, nothing]).amax() for terms in largest.values()]
        for value in passes.largest(torch.stack(of_levels)).flip(0):
            floors.append(torch.maximum(floors[-1], value))
    floors.reverse()
    both = enumerate(zip(levels, floors, strict=True))
    return passes({f"{level}": PairLosses(pairs, lse, floor) for level, (pairs, floor) in both})


def _somewhere(clusters: Tensor, ignore_index: int) -> Tensor:
    """An id that says whether a sample has a cluster at some level."""
    someone = 0 if ignore_index != 0 else 1
    return torch.where((clusters != ignore_index).any(1), someone, ignore_index)


def check_levels(name: str, value: object) -> int:
    """How many levels there are, if it is a column of ids for each."""
    value = check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(f"{name}: expected a matrix [rows, levels], got shape {tuple(value.shape)}")
    return value.shape[1]
