"""Centroids cut into shards, one for each rank: what K · d numbers a rank cannot hold several times.

Samples in memory stay where they are, and the shards travel round the ranks. Every rank's samples meet each
of them, and keep the nearest centroid so far: the least distance, and of equal ones the lowest index, in
whatever order shards come by. Then the sums of each shard's clusters are added up on the rank that has it.

Samples in files come to the shards instead, so that a pass reads every file once. One rank after the other
shows a block to all; each tells the nearest of its centroids, the least is agreed on, and whoever holds that
centroid adds the sample to its sums.

A pass has nothing of K · d numbers whole on a rank; K counts it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points, Ranks
from wscl_fast.distributed.collectives import sum_to_rank
from wscl_fast.distributed.ring import blocks_of_ranks
from wscl_fast.functional import kmeans_assign, kmeans_distances
from wscl_fast.functional.kmeans_bounds import add_to_sums


class Shards:
    """Which rank holds which of K centroids: consecutive ones, in the order of the ranks, evenly."""

    def __init__(self, n_clusters: int, ranks: Ranks) -> None:
        self.ranks, self.n_clusters = ranks, n_clusters
        cuts = [n_clusters * i // ranks.size for i in range(ranks.size + 1)]
        self.slices = [slice(first, last) for first, last in pairwise(cuts)]
        self.sizes = [part.stop - part.start for part in self.slices]
        self.own = self.slices[ranks.rank]

    def whole(self, shard: Tensor) -> Tensor:
        """All ranks' shards, on every rank [K, d]."""
        return self.ranks.gather(shard)

    def rows(self, points: Points, index: Tensor) -> Tensor:
        """Of rows by their number among all ranks' [K] the shard of this rank; no rank has all of them."""
        own = torch.empty(0)
        for owner, part in enumerate(self.slices):
            rows = points.directions(points.rows_of_all(index[part]))
            if owner == self.ranks.rank:
                own = rows
        return own


def nearest_of_shards(
    points: Points, centroids: Tensor, shards: Shards, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest of all ranks' centroids, int64 [n], and the squared distance from it, float64 [n].

    Of samples in files also adds up the `sums` of this rank's clusters, float64.
    """
    square = torch.full((points.n,), torch.inf, dtype=torch.float64, device=points.device)
    nearest = torch.full((points.n,), shards.n_clusters, device=points.device)
    if points.all_in_memory:
        for owner, shard in blocks_of_ranks(centroids, shards.sizes, shards.ranks.group):
            exact = shard.double()  # of two shards' nearest the one that float64 tells, as within a shard
            for rows, block in points.blocks():
                found, apart = nearest_of_shard(points, block, shard, exact)
                found = found + shards.slices[owner].start
                best, known = square[rows], nearest[rows]
                closer = (apart < best) | ((apart == best) & (found < known))
                square[rows] = apart.where(closer, best)
                nearest[rows] = found.where(closer, known)
        return nearest, square
    exact, first = centroids.double(), shards.own.start
    for own, block, weights in _shown(points):
        found, apart = nearest_of_shard(points, block, centroids, exact)
        best = points.ranks.least(apart)
        # Of equally near ones the lowest: those that are not the nearest stand back.
        number = points.ranks.least((found + first).where(apart == best, shards.n_clusters))
        if own is not None:
            square[own], nearest[own] = best, number
        if sums is not None:
            _add(points, sums, block, number - first, weights)
    return nearest, square


def nearest_of_shard(points: Points, block: Tensor, shard: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of a shard's centroids, of which `exact` is float64, and the squared distance from it."""
    if not len(shard):  # fewer centroids than ranks
        nothing = torch.full((len(block),), torch.inf, dtype=torch.float64, device=block.device)
        return torch.zeros_like(nothing, dtype=torch.int64), nothing
    found = kmeans_assign(block, shard, metric=points.metric).assignment
    apart = kmeans_distances(block, exact, found, metric=points.metric).distance
    return found, 2 * apart if points.metric == "cosine" else apart


def sums_of_shard(points: Points, assignment: Tensor, shards: Shards) -> Tensor:
    """The sums of this rank's shard of clusters over all ranks' samples in memory, float64."""
    own = torch.empty(0)
    for owner, clusters in enumerate(shards.slices):
        shape = (shards.sizes[owner], points.dim)
        sums = torch.zeros(shape, dtype=torch.float64, device=points.device)
        for rows, block in points.blocks():
            weights = None if points.weights is None else points.weights[rows]
            _add(points, sums, block, assignment[rows] - clusters.start, weights)
        sums = sum_to_rank(sums, owner, shards.ranks.group)
        if owner == shards.ranks.rank:
            own = sums
    return own


def _add(points: Points, sums: Tensor, block: Tensor, clusters: Tensor, weights: Tensor | None) -> None:
    """Adds rows to the sums of their clusters, as far as these are among them."""
    here = ((clusters >= 0) & (clusters < len(sums))).nonzero()[:, 0]
    for some in torch.split(here, points.rows_at_once()):
        weight = None if weights is None else weights[some]
        add_to_sums(sums, block[some], clusters[some], weights=weight, metric=points.metric)


class _Shown(NamedTuple):
    """A block of rows that is on every rank."""

    own: slice | None  # which of this rank's rows; None where they are another's
    block: Tensor
    weights: Tensor | None


def _shown(points: Points) -> Iterator[_Shown]:
    """The blocks of all ranks, each on every rank: the first of each rank, the second of each, and so on.

    Every rank has to go through all of them.
    """
    ranks, device = points.ranks, points.device
    dtype = points.stored if points.frame.plain else points.dtype
    blocks = points.parts() if points.in_memory else points.blocks()
    while True:
        rows, block = next(blocks, (slice(0), torch.empty(0, points.dim)))
        block = block.to(device, dtype).contiguous()
        sizes = ranks.of_all(torch.tensor(len(block), device=device)).tolist()
        if not any(sizes):
            return
        for owner, size in enumerate(sizes):
            if not size:
                continue
            mine = owner == ranks.rank
            shown = block if mine else block.new_empty(size, points.dim)
            # As bytes, which every backend carries.
            shown = ranks.told(shown.view(torch.uint8), owner).view(dtype)
            weights = points.weights
            if weights is not None:
                weights = ranks.told(weights[rows] if mine else weights.new_empty(size), owner)
            yield _Shown(rows if mine else None, shown, weights)
