"""Centroids cut into shards, one for each rank: what K · d numbers a rank cannot hold several times.

In a pass the shards travel round the ranks. Every rank's samples meet each of them, and keep the nearest
centroid so far: the least distance, and of equal ones the lowest index, whatever the order in which shards
come by. Then the sums of each shard's clusters are added up on the rank that holds it. A pass has nothing of
K · d numbers whole on a rank; K counts it has.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points, Ranks
from wscl_fast.clustering.search import Step
from wscl_fast.distributed.collectives import sum_to_rank
from wscl_fast.distributed.ring import blocks_of_ranks
from wscl_fast.functional import kmeans_assign, kmeans_distances
from wscl_fast.functional.kmeans_bounds import add_to_sums


class Shards:
    """Which rank holds which of K centroids: consecutive ones, in the order of the ranks, evenly."""

    def __init__(self, n_clusters: int, ranks: Ranks) -> None:
        self.ranks = ranks
        cuts = [n_clusters * i // ranks.size for i in range(ranks.size + 1)]
        self.slices = [slice(first, last) for first, last in pairwise(cuts)]
        self.sizes = [part.stop - part.start for part in self.slices]
        self.own = self.slices[ranks.rank]

    def whole(self, shard: Tensor) -> Tensor:
        """All ranks' shards, on every rank [K, d]."""
        return self.ranks.gather(shard)


class ShardedSearch:
    """`Search` for centroids of which each rank holds a shard; the assignments and sums are the same."""

    bounds = None

    def __init__(self, points: Points, shards: Shards) -> None:
        self.points, self.shards = points, shards
        self.n_clusters = shards.slices[-1].stop
        self.assignment = torch.full((points.n,), -1, device=points.device)

    def __call__(self, centroids: Tensor) -> Step:
        points = self.points
        assignment, square = self._nearest(centroids)
        changed = (assignment != self.assignment).sum()
        self.assignment = assignment
        weight = torch.ones_like(square) if points.weights is None else points.weights
        counts = torch.zeros(self.n_clusters, dtype=torch.float64, device=points.device)
        counts.index_put_((assignment,), weight, accumulate=True)
        totals = points.ranks.sum(torch.cat([counts, torch.stack([square @ weight, changed.double()])]))
        counts = totals[:-2] if points.weights is not None else totals[:-2].long()
        sums = self._sums(assignment)
        return Step(assignment, square.to(points.dtype), sums, counts, float(totals[-2]), int(totals[-1]))

    def _nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of all ranks' centroids, int64 [n], and the squared distance from it, float64 [n]."""
        points = self.points
        square = torch.full((points.n,), torch.inf, dtype=torch.float64, device=points.device)
        nearest = torch.full((points.n,), self.n_clusters, device=points.device)
        scale = 2 if points.metric == "cosine" else 1
        for owner, shard in blocks_of_ranks(centroids, self.shards.sizes, self.shards.ranks.group):
            if not len(shard):
                continue
            exact = shard.double()  # of two shards' nearest the one that float64 tells, as within a shard
            for rows, block in points.blocks():
                found = kmeans_assign(block, shard, metric=points.metric).assignment
                apart = kmeans_distances(block, exact, found, metric=points.metric).distance * scale
                found = found + self.shards.slices[owner].start
                best, known = square[rows], nearest[rows]
                closer = (apart < best) | ((apart == best) & (found < known))
                square[rows] = apart.where(closer, best)
                nearest[rows] = found.where(closer, known)
        return nearest, square

    def _sums(self, assignment: Tensor) -> Tensor:
        """The sums of this rank's shard of clusters over all ranks' samples, float64."""
        points, own = self.points, torch.empty(0)
        for owner, clusters in enumerate(self.shards.slices):
            shape = (self.shards.sizes[owner], points.dim)
            sums = torch.zeros(shape, dtype=torch.float64, device=points.device)
            for rows, block in points.parts():
                local = assignment[rows] - clusters.start
                here = ((local >= 0) & (local < len(sums))).nonzero()[:, 0]
                weights = None if points.weights is None else points.weights[rows][here]
                add_to_sums(sums, block[here], local[here], weights=weights, metric=points.metric)
            sums = sum_to_rank(sums, owner, self.shards.ranks.group)
            if owner == self.shards.ranks.rank:
                own = sums
        return own
