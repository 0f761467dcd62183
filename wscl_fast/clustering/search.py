"""One pass of Lloyd's iteration over the data: each sample's cluster, and the sums of the clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.bounds import Bounds
from wscl_fast.clustering.points import Points
from wscl_fast.functional import kmeans_update
from wscl_fast.functional.kmeans_bounds import bounds_are_fused

# Inside the pass bounds cost next to nothing. Put together from several passes they begin to pay when few
# samples change their cluster; against few clusters of few dimensions a product is as fast as keeping them.
_FEW_CHANGES = 0.1
_LEAST_WORK = 1 << 15  # K · d
_TOO_MANY_SEARCHED = 0.7


class Step(NamedTuple):
    """One pass over the data."""

    assignment: Tensor  # int64 [n]
    distance: Tensor  # squared, [n]
    sums: Tensor  # float64, of all ranks: [K, d], or where centroids are cut into shards those of this rank
    counts: Tensor  # [K], of all ranks
    inertia: float
    changed: int  # samples of all ranks in another cluster than in the pass before


class Patience:
    """When bounds are tried that are kept beside the search, by what the passes before told."""

    def __init__(self) -> None:
        self.rest = 0  # passes to go without bounds
        self.pause = 4

    def worth_a_try(self, points: Points, changed: int | None, n_clusters: int, dim: int) -> bool:
        """Whether to begin, where so many samples changed in the last pass (None: there was none)."""
        if changed is None:
            return False
        self.rest -= 1
        few = changed <= _FEW_CHANGES * points.n_all
        return few and n_clusters * dim >= _LEAST_WORK and self.rest < 0

    def ends(self, points: Points, searched: float) -> bool:
        """Whether to give up, since they left so many samples of all ranks to search."""
        if searched <= _TOO_MANY_SEARCHED * points.n_all:
            return False
        self.rest = self.pause
        self.pause *= 2
        return True


class Search:
    """Finds each sample's cluster again and again, with bounds once they pay."""

    def __init__(self, points: Points, algorithm: str, bounds: Bounds | None) -> None:
        self.points, self.algorithm = points, algorithm
        self.bounds = bounds
        self.fused = bounds_are_fused(points.device, points.dtype)
        self.last: Step | None = None
        self.assignment: Tensor | None = None  # int64 [n], renewed in place
        self.distance: Tensor | None = None  # [n]
        self.sums: Tensor | None = None  # of this rank's rows, under `last`
        self.patience = Patience()

    def __call__(self, centroids: Tensor) -> Step:
        if self.bounds is None and self._worth_it(*centroids.shape):
            self.bounds = Bounds(self.points, len(centroids), self.assignment, self.sums)
        step = self._bounded(centroids) if self.bounds is not None else self._plain(centroids)
        self.last = step
        return step

    def _worth_it(self, n_clusters: int, dim: int) -> bool:
        if self.algorithm == "lloyd" or n_clusters < 2:
            return False
        if self.algorithm == "hamerly" or self.fused:
            return True
        changed = None if self.last is None else self.last.changed
        return self.patience.worth_a_try(self.points, changed, n_clusters, dim)

    def _plain(self, centroids: Tensor) -> Step:
        points = self.points
        if self.assignment is None or self.distance is None:
            self.assignment = torch.full((points.n,), -1, device=points.device)
            self.distance = torch.empty(points.n, dtype=points.dtype, device=points.device)
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=points.device)
        totals = torch.zeros(len(centroids) + 2, dtype=torch.float64, device=points.device)
        scale = 2 if points.metric == "cosine" else 1  # 1 − cos as the squared distance of unit vectors
        for rows, block in points.blocks():
            weights = None if points.weights is None else points.weights[rows]
            found = kmeans_update(block, centroids, weights=weights, metric=points.metric)
            totals[-1] += (found.assignment != self.assignment[rows]).sum()
            self.assignment[rows], self.distance[rows] = found.assignment, found.distance
            sums += found.sums
            totals[:-2] += found.counts
            totals[-2] += found.inertia * scale
        if scale != 1:
            self.distance *= scale
        self.sums = sums
        return self._shared(self.assignment, self.distance, totals)

    def _bounded(self, centroids: Tensor) -> Step:
        bounds = self.bounds
        assert bounds is not None
        changed = bounds.search(centroids)
        self.sums = bounds.sums
        if self.algorithm == "auto" and not self.fused:
            searched = self.points.ranks.sum(bounds.counts.new_tensor(bounds.searched))
            if not bounds.begun and self.patience.ends(self.points, float(searched)):
                self.bounds = None
        self.assignment = bounds.assignment
        if self.points.ranks.alone:
            return Step(
                bounds.assignment, bounds.distance, bounds.sums, bounds.counts, bounds.inertia, changed
            )
        totals = torch.cat([bounds.counts.double(), bounds.sums.new_tensor([bounds.inertia, changed])])
        return self._shared(bounds.assignment, bounds.distance, totals)

    def _shared(self, assignment: Tensor, distance: Tensor, totals: Tensor) -> Step:
        assert self.sums is not None
        totals, sums = self.points.ranks.sum(totals), self.points.ranks.sum(self.sums)
        counts = totals[:-2] if self.points.weights is not None else totals[:-2].long()
        return Step(assignment, distance, sums, counts, float(totals[-2]), int(totals[-1]))
