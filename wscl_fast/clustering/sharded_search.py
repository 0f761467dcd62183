"""A pass of Lloyd's iteration over centroids that are cut into shards, with bounds once they pay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points
from wscl_fast.clustering.search import Patience, Step
from wscl_fast.clustering.shards import Shards, nearest_of_shards, sums_of_shard
from wscl_fast.distributed.ring import blocks_of_ranks
from wscl_fast.functional import kmeans_assign, kmeans_distances
from wscl_fast.functional.kmeans_bounds import loosen, movement
from wscl_fast.scatter import add_rows


class ShardedSearch:
    """`Search` for centroids of which each rank holds a shard; the assignments and sums are the same.

    Samples in memory keep bounds once they pay: those that stay, by what their own centroid and the farthest
    other one moved, meet nothing but their own centroid when its shard comes by.
    """

    bounds = None

    def __init__(self, points: Points, shards: Shards, algorithm: str = "lloyd") -> None:
        self.points, self.shards, self.algorithm = points, shards, algorithm
        self.assignment = torch.full((points.n,), -1, device=points.device)
        self.patience = Patience()
        self.changed: int | None = None
        self.kept: ShardBounds | None = None

    def __call__(self, centroids: Tensor) -> Step:
        points, shards = self.points, self.shards
        assignment, square, sums = self._found(centroids)
        changed = (assignment != self.assignment).sum()
        self.assignment = assignment
        weight = torch.ones_like(square) if points.weights is None else points.weights
        counts = torch.zeros(shards.n_clusters, dtype=torch.float64, device=points.device)
        add_rows(counts, assignment, weight)
        totals = points.ranks.sum(torch.cat([counts, torch.stack([square @ weight, changed.double()])]))
        counts = totals[:-2] if points.weights is not None else totals[:-2].long()
        self.changed = int(totals[-1])
        return Step(assignment, square.to(points.dtype), sums, counts, float(totals[-2]), self.changed)

    def _found(self, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assignment, squared distance and the sums of this rank's clusters."""
        points, shards = self.points, self.shards
        if not points.all_in_memory:
            sums = torch.zeros(centroids.shape, dtype=torch.float64, device=points.device)
            return *nearest_of_shards(points, centroids, shards, sums), sums
        if self.kept is None and self._worth_it(points.dim):
            self.kept = ShardBounds(points, shards)
        if (kept := self.kept) is None:
            assignment, square = nearest_of_shards(points, centroids, shards)
        else:
            assignment, square = kept.search(centroids, self.assignment)
            if self.algorithm == "auto" and not kept.begun and self.patience.ends(points, kept.searched):
                self.kept = None
        return assignment, square, sums_of_shard(points, assignment, shards)

    def _worth_it(self, dim: int) -> bool:
        if self.algorithm == "lloyd" or self.shards.n_clusters < 2:
            return False
        if self.algorithm == "hamerly":
            return True
        return self.patience.worth_a_try(self.points, self.changed, self.shards.n_clusters, dim)


class ShardBounds:
    """Hamerly's bounds of this rank's samples, in memory, while shards go round the ranks once a pass.

    Whether a sample stays has to be known before its own centroid comes by, so the distance from that is
    bounded by the last one and by what the centroid moved; the movements, K numbers, are on every rank.
    """

    def __init__(self, points: Points, shards: Shards) -> None:
        self.points, self.shards = points, shards
        self.square = torch.empty(0)  # float64 [n], from the own centroid
        self.lower = torch.empty(0)  # float64 [n], bound of the distance from any other
        self.centroids: Tensor | None = None  # this rank's shard, that they were taken to
        self.begun = True  # whether the last search had no bounds to go by
        self.searched = 0.0  # samples of all ranks that met every centroid in it
        eps = torch.finfo(torch.float64).eps
        self._rounding = (points.dim + 8) * eps
        self._slack = 8 * eps if points.metric == "cosine" else 0.0

    def search(self, centroids: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of all ranks' centroids, int64 [n], and the squared distance from it, float64 [n].

        `assignment` is that of the last search with these bounds.
        """
        points, shards = self.points, self.shards
        self.begun = self.centroids is None
        asks = torch.ones_like(assignment, dtype=torch.bool)
        if self.centroids is not None:
            moved = points.ranks.gather(movement(centroids, self.centroids, points.metric))
            loosen(self.lower, moved, assignment, self._rounding)
            upper = (self.square.sqrt() + moved[assignment]) * (1 + self._rounding) + self._slack
            asks = ~(upper < self.lower)
        self.searched = float(points.ranks.sum(asks.sum()))
        nearest = assignment.where(~asks, shards.n_clusters)
        square = torch.full((points.n,), torch.inf, dtype=torch.float64, device=points.device)
        second = square.clone()
        for owner, shard in blocks_of_ranks(centroids, shards.sizes, shards.ranks.group):
            first, exact = shards.slices[owner].start, shard.double()
            inside = ~asks & (nearest >= first) & (nearest < first + len(shard))
            for rows, block in self._rows(inside, len(shard)):
                square[rows] = self._apart(block, exact, nearest[rows] - first)
            for rows, block in self._rows(asks, len(shard)) if len(shard) else ():
                found = kmeans_assign(block, shard, metric=points.metric, top=min(2, len(shard))).assignment
                ids = found.view(len(block), -1)
                apart = self._apart(block, exact, ids[:, 0])
                beside = self._apart(block, exact, ids[:, -1]) if len(shard) > 1 else apart + torch.inf
                number, best, known = ids[:, 0] + first, square[rows], nearest[rows]
                closer = (apart < best) | ((apart == best) & (number < known))
                second[rows] = torch.minimum(torch.minimum(second[rows], beside), best.where(closer, apart))
                square[rows], nearest[rows] = apart.where(closer, best), number.where(closer, known)
        bound = second.sqrt() * (1 - self._rounding) - self._slack
        self.lower = bound if self.begun else bound.where(asks, self.lower)
        self.square, self.centroids = square, centroids
        return nearest, square

    def _apart(self, block: Tensor, exact: Tensor, ids: Tensor) -> Tensor:
        metric = self.points.metric
        return kmeans_distances(block, exact, ids, metric=metric).distance * (2 if metric == "cosine" else 1)

    def _rows(self, wanted: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows that are wanted, by their numbers, part by part."""
        step = max(self.points.rows_at_once(), width)
        for rows, block in self.points.blocks():
            some = wanted[rows].nonzero()[:, 0]
            for part in torch.split(some, step) if len(some) else ():
                yield part + rows.start, block[part]
