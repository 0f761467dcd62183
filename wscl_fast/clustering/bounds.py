"""Hamerly's bounds: which samples cannot have changed their cluster, from how far the centroids moved.

For each sample an upper bound of the distance to its centroid and a lower bound of the distance to any
other are kept. Centroids that move by δ loosen both by at most δ (the triangle inequality), and while the
upper bound stays below the lower one, or below half the distance from its centroid to the next, the nearest
centroid is the same. The others' distance is taken anew, and those that fail again are searched, packed
together. Bounds are rounded outwards, so that no assignment differs from that of a full search.

Source: Hamerly, *Making k-means even faster*, SDM 2010. New here: samples may move as well, by a known
distance each, so that the bounds of one epoch's clustering serve the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points
from wscl_fast.functional import kmeans_assign


class Carried(NamedTuple):
    """What one fit leaves to the next."""

    assignment: Tensor  # int64 [n]
    upper: Tensor  # [n], bound of the distance to the sample's own centroid
    lower: Tensor  # [n], bound of the distance to any other
    centroids: Tensor  # [K, d] that they were taken to


class Bounds:
    """Bounds of the distances of this rank's rows, and the sums of their clusters, kept as rows change.

    Args:
        points: the samples.
        assignment: int64 [n], a cluster of each sample.
        sums: float64 [K, d], the sums of these clusters' rows.
    """

    def __init__(self, points: Points, assignment: Tensor, sums: Tensor) -> None:
        self.points = points
        self.assignment = assignment.clone()
        self.sums = sums.clone()
        self.upper: Tensor | None = None  # [n]
        self.lower: Tensor | None = None  # [n]
        self.centroids: Tensor | None = None  # that the bounds were taken to
        self.searched = 0  # rows that the last search had to look at in full
        self._square: float | None = None
        eps = torch.finfo(points.dtype).eps
        self._up, self._down = 1 + 4 * eps, 1 - 4 * eps
        self._slack = 8 * eps if points.metric == "cosine" else 0.0

    def search(self, centroids: Tensor) -> int:
        """Bring every assignment up to date; returns how many changed."""
        n = self.points.n
        if self.upper is None or self.lower is None:
            rows = torch.arange(n, device=self.points.device)
            self.upper = torch.empty(n, dtype=self.points.dtype, device=self.points.device)
            self.lower = torch.empty_like(self.upper)
        else:
            self._follow(centroids)
            rows = self._undecided(centroids)
        self.centroids = centroids
        self.searched = len(rows)
        return self._search(rows, centroids)

    def carry(self) -> Carried | None:
        """What the next fit can use, or None where nothing was searched."""
        if self.upper is None or self.lower is None or self.centroids is None:
            return None
        return Carried(self.assignment, self.upper, self.lower, self.centroids)

    @classmethod
    def resumed(cls, points: Points, carried: Carried, drift: Tensor) -> Bounds:
        """Bounds for samples that moved by at most `drift` [n] each since `carried` was kept."""
        self = cls(
            points, carried.assignment, cluster_sums(points, carried.assignment, len(carried.centroids))
        )
        drift = drift.to(carried.upper) * self._up
        self.upper = (carried.upper + drift) * self._up
        self.lower = carried.lower - drift
        self.lower.sub_(self.lower.abs(), alpha=1 - self._down)
        self.centroids = carried.centroids
        return self

    def inertia(self, centroids: Tensor) -> float:
        """Sum of weighted squared distances by `Σ w ‖x‖² − Σ_k (2 c·s − W ‖c‖²)`, in float64."""
        if self._square is None:
            self._square = _total_square(self.points)
        weight = torch.bincount(self.assignment, self.points.weights, minlength=len(centroids)).double()
        c = centroids.double()
        return max(0.0, self._square - float((c * (2 * self.sums - weight[:, None] * c)).sum()))

    def _follow(self, centroids: Tensor) -> None:
        """Loosen the bounds by what the centroids moved."""
        assert self.centroids is not None
        assert self.upper is not None
        assert self.lower is not None
        moved = (centroids.double() - self.centroids.double()).norm(dim=1)
        farthest = moved.topk(2)
        # The others' largest movement: a centroid does not move away from its own samples' lower bound.
        other = torch.where(
            torch.arange(len(moved), device=moved.device) == farthest.indices[0],
            farthest.values[1],
            farthest.values[0],
        )
        moved, other = (moved * self._up).to(self.upper), (other * self._up).to(self.upper)
        self.upper.add_(moved[self.assignment]).mul_(self._up)
        self.lower.sub_(other[self.assignment])
        self.lower.sub_(self.lower.abs(), alpha=1 - self._down)

    def _undecided(self, centroids: Tensor) -> Tensor:
        """Rows whose bounds do not tell their cluster, after their upper bound was taken anew."""
        assert self.upper is not None
        assert self.lower is not None
        safe = self.lower
        if 8 * len(centroids) <= self.points.n_all:
            near = kmeans_assign(centroids, centroids, metric=self.points.metric, top=2).distance[:, 1]
            half = self._length(near) * (0.5 * self._down)
            safe = torch.maximum(safe, half[self.assignment])
        rows = (self.upper >= safe).nonzero()[:, 0]
        if not len(rows):
            return rows
        for part in _split(rows, self.points.rows_at_once()):
            x = self.points.directions(self.points.rows(part))
            exact = (x - centroids[self.assignment[part]]).square_().sum(dim=1).sqrt_()
            rounding = 1 + (self.points.dim / 2 + 4) * torch.finfo(self.points.dtype).eps
            self.upper[part] = exact * rounding + self._slack
        return rows[self.upper[rows] >= safe[rows]]

    def _search(self, rows: Tensor, centroids: Tensor) -> int:
        assert self.upper is not None
        assert self.lower is not None
        changed = 0
        whole = len(rows) == self.points.n and self.points.frame.plain
        for part in _split(rows, len(rows) if whole else self.points.rows_at_once()):
            x = self.points.x if whole else self.points.rows(part)
            found = kmeans_assign(x, centroids, metric=self.points.metric, top=2)
            self.upper[part] = self._length(found.distance[:, 0]) * self._up + self._slack
            self.lower[part] = self._length(found.distance[:, 1]) * self._down - self._slack
            nearest = found.assignment[:, 0]
            other = (nearest != self.assignment[part]).nonzero()[:, 0]
            if len(other):
                self._reassign(part[other], nearest[other])
                changed += len(other)
        return changed

    def _reassign(self, rows: Tensor, clusters: Tensor) -> None:
        values = self.points.directions(self.points.rows(rows)).double()
        if self.points.weights is not None:
            values = values * self.points.weights[rows, None]
        add_rows(self.sums, clusters, values)
        add_rows(self.sums, self.assignment[rows], -values)
        self.assignment[rows] = clusters

    def _length(self, distance: Tensor) -> Tensor:
        """The Euclidean distance, of the unit vectors when cosine."""
        return (2 * distance if self.points.metric == "cosine" else distance).to(self.points.dtype).sqrt()


def _split(rows: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), max(1, size)):
        yield rows[start : start + size]


def add_rows(sums: Tensor, clusters: Tensor, values: Tensor) -> None:
    """`sums.index_add_(0, clusters, values)`, in the same order in every run."""
    if sums.is_cuda:  # sorted, which atomic additions are not
        sums.index_put_((clusters,), values, accumulate=True)
    else:
        sums.index_add_(0, clusters, values)


def cluster_sums(points: Points, assignment: Tensor, n_clusters: int) -> Tensor:
    """The weighted sum of each cluster's rows (of their directions when cosine), float64 [K, d]."""
    sums = torch.zeros(n_clusters, points.dim, dtype=torch.float64, device=points.device)
    for rows, block in points.parts():
        values = points.directions(block).double()
        if points.weights is not None:
            values = values * points.weights[rows, None]
        add_rows(sums, assignment[rows], values)
    return sums


def distances(points: Points, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Squared distance of each row of this rank from its centroid, float64 [n]."""
    found = torch.empty(points.n, dtype=torch.float64, device=points.device)
    for rows, block in points.parts():
        x = points.directions(block).double()
        found[rows] = (x - centroids[assignment[rows]].double()).square_().sum(dim=1)
    return found


def inertia_of(points: Points, centroids: Tensor, assignment: Tensor) -> float:
    """Sum of weighted squared distances of all ranks' rows, in float64."""
    square = distances(points, centroids, assignment)
    total = square.sum() if points.weights is None else square @ points.weights
    return float(points.ranks.sum(total))


def _total_square(points: Points) -> float:
    total = torch.zeros((), dtype=torch.float64, device=points.device)
    for rows, block in points.parts():
        square = points.directions(block).double().square().sum(dim=1)
        total += square.sum() if points.weights is None else square @ points.weights[rows]
    return float(total)
