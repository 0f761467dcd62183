"""Clustered InfoNCE over levels of clusters: one log-sum-exp, and a sum over clusters for each level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wscl_fast import chunked, reference
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import check_choice, check_vector
from wscl_fast.functional._inputs import Impl, Inputs, Reduction, check_inputs, choose, reduce_rows
from wscl_fast.functional._passes import logsumexp
from wscl_fast.functional.infonce import Positives
from wscl_fast.pairs import Pairs, matching_count, matching_mean

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
    check_choice("positives", positives, Positives)
    check_choice("constraint", constraint, Constraint)
    check_choice("reduction", reduction, Reduction)
    check_choice("impl", impl, Impl)
    if constraint == "level" and reduction == "none":
        raise ValueError("constraint: 'level' is one between means or sums, got reduction='none'")
    if constraint == "pair" and positives == "in":
        raise ValueError("constraint: 'pair' needs a loss of each pair, got positives='in'")
    _check_levels("query_clusters", query_clusters)
    levels = query_clusters.shape[1]
    if key_clusters is not None:
        _check_levels("key_clusters", key_clusters)
        if key_clusters.shape[1] != levels:
            raise ValueError(
                f"key_clusters: expected {levels} levels as in query_clusters, got {key_clusters.shape[1]}"
            )
    level_weight = _level_weights(level_weights, levels)
    inputs = check_inputs(
        queries,
        keys,
        _somewhere(query_clusters, ignore_index),
        None if key_clusters is None else _somewhere(key_clusters, ignore_index),
        temperature,
        ignore_index,
        exclude_self,
    )
    if weights is not None:
        check_vector("weights", weights, len(queries), queries, integer=False)
    key_levels = query_clusters if key_clusters is None else key_clusters
    impl = choose(impl, inputs.pairs.queries)
    with torch.autocast(queries.device.type, enabled=False):
        pairs = [
            inputs.with_ids(ids, key_ids)
            for ids, key_ids in zip(query_clusters.unbind(1), key_levels.unbind(1), strict=True)
        ]
        if impl == "reference":
            rows = reference.hierarchical_infonce(
                inputs.pairs, pairs, inner=positives == "in", by_pair=constraint == "pair"
            )
        else:
            rows = _rows(inputs, pairs, positives == "in", constraint == "pair", impl == "fused")
        losses = [reduce_rows(loss, count, weights, reduction) for loss, count in rows]
        if constraint == "level":
            for level in reversed(range(levels - 1)):
                losses[level] = torch.maximum(losses[level], losses[level + 1])
        weighted = torch.stack(losses, -1) * _beside(level_weight, losses[0])
        return weighted if reduction == "none" else weighted.sum(-1)


def _beside(values: list[float] | Tensor, like: Tensor) -> Tensor:
    """Numbers as a tensor beside another."""
    if isinstance(values, Tensor):
        return values.to(like)
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _rows(
    inputs: Inputs, levels: list[Pairs], inner: bool, by_pair: bool, fused: bool
) -> list[tuple[Tensor, Tensor]]:
    """Loss and positives' count of every row, level by level."""
    everyone = inputs.pairs.folded()
    lse = logsumexp(everyone, "all", fused=fused)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    rows: list[tuple[Tensor, Tensor]] = []
    worst = lse.new_full((), -torch.inf)
    for pairs in reversed(levels):
        level = everyone._replace(query_ids=pairs.query_ids, key_ids=pairs.key_ids)
        if by_pair:
            count = matching_count(level)
            total, largest = chunked.pair_losses(level, lse, worst)
            loss = total / count.clamp(min=1).to(total.dtype)
            worst = torch.maximum(worst, largest)
        elif inner:
            count = matching_count(level)
            pooled = logsumexp(level, "same", fused=fused).masked_fill(count == 0, 0)
            loss = lse - pooled + count.clamp(min=1).to(lse.dtype).log()
        else:
            mean, count = matching_mean(level)
            loss = lse - mean
        rows.insert(0, (torch.where(count > 0, loss, 0.0), count))
    return rows


def _somewhere(clusters: Tensor, ignore_index: int) -> Tensor:
    """An id that says whether a sample has a cluster at some level."""
    someone = 0 if ignore_index != 0 else 1
    return torch.where((clusters != ignore_index).any(1), someone, ignore_index)


def _check_levels(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(f"{name}: expected a matrix [rows, levels], got shape {tuple(value.shape)}")


def _level_weights(values: Sequence[float] | Tensor | None, levels: int) -> list[float] | Tensor:
    if values is None:
        return [1 / levels] * levels
    if len(values) != levels:
        raise ValueError(f"level_weights: expected {levels} numbers, one a level, got {len(values)}")
    if isinstance(values, Tensor):
        return values
    numbers = [float(value) for value in values]
    if not all(math.isfinite(value) and value >= 0 for value in numbers):
        raise ValueError(f"level_weights: expected finite numbers of at least 0, got {numbers}")
    return numbers
