"""Hamerly's bounds: which samples cannot have changed their cluster, from how far the centroids moved.

For each sample a lower bound of the distance to any centroid but its own is kept. Centroids that move by δ
loosen it by at most δ (the triangle inequality). One pass over the data takes every sample's distance to its
own centroid, which costs as much as reading the data and gives the inertia as it is defined; while that is
below the bound, or below half the distance from the centroid to the next one, the nearest centroid is the
same. Samples of which this cannot be said are searched, packed together. Bounds are rounded outwards, so
that no assignment differs from that of a full search.

Source: Hamerly, *Making k-means even faster*, SDM 2010. New here: samples may move as well, by a known
distance each, so that the bounds of one epoch's clustering serve the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points
from wscl_fast.functional import kmeans_assign, kmeans_distances


class Carried(NamedTuple):
    """What one fit leaves to the next."""

    assignment: Tensor  # int64 [n]
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
        self.lower: Tensor | None = None  # [n]
        self.centroids: Tensor | None = None  # that the bounds were taken to
        self.distance = torch.empty(points.n, dtype=points.dtype, device=points.device)  # squared, to the own
        self.inertia = 0.0  # of this rank's rows
        self.searched = 0  # rows that the last search had to look at in full
        self.begun = True  # whether the last search had no bounds to go by
        eps = torch.finfo(points.dtype).eps
        self._up, self._down = 1 + 4 * eps, 1 - 4 * eps
        self._slack = 8 * eps if points.metric == "cosine" else 0.0

    def search(self, centroids: Tensor) -> int:
        """Bring every assignment and distance up to date; returns how many assignments changed."""
        n = self.points.n
        self.begun = self.lower is None
        if self.lower is None:
            rows = torch.arange(n, device=self.points.device)
            self.lower = torch.empty(n, dtype=self.points.dtype, device=self.points.device)
            self.inertia = 0.0
        else:
            self._follow(centroids)
            rows = self._undecided(centroids)
        self.centroids = centroids
        self.searched = len(rows)
        return self._search(rows, centroids)

    def carry(self) -> Carried | None:
        """What the next fit can use, or None where nothing was searched."""
        if self.lower is None or self.centroids is None:
            return None
        return Carried(self.assignment, self.lower, self.centroids)

    @classmethod
    def resumed(cls, points: Points, carried: Carried, drift: Tensor) -> Bounds:
        """Bounds for samples that moved by at most `drift` [n] each since `carried` was kept."""
        self = cls(
            points, carried.assignment, cluster_sums(points, carried.assignment, len(carried.centroids))
        )
        self.lower = carried.lower - drift.to(carried.lower) * self._up
        self.lower.sub_(self.lower.abs(), alpha=1 - self._down)
        self.centroids = carried.centroids
        return self

    def _follow(self, centroids: Tensor) -> None:
        """Loosen the bounds by what the centroids moved."""
        assert self.centroids is not None
        assert self.lower is not None
        moved = (centroids.double() - self.centroids.double()).norm(dim=1)
        farthest = moved.topk(2)
        # The others' largest movement: a centroid does not move away from its own samples' lower bound.
        other = torch.where(
            torch.arange(len(moved), device=moved.device) == farthest.indices[0],
            farthest.values[1],
            farthest.values[0],
        )
        other = (other * self._up).to(self.lower)
        self.lower.sub_(other[self.assignment])
        self.lower.sub_(self.lower.abs(), alpha=1 - self._down)

    def _undecided(self, centroids: Tensor) -> Tensor:
        """Rows whose bounds do not tell their cluster, after every distance to the own centroid was taken."""
        assert self.lower is not None
        points, safe = self.points, self.lower
        if 8 * len(centroids) <= points.n_all:
            near = kmeans_assign(centroids, centroids, metric=points.metric, top=2).distance[:, 1]
            half = self._length(near) * (0.5 * self._down)
            safe = torch.maximum(safe, half[self.assignment])
        total = torch.zeros((), dtype=torch.float64, device=points.device)
        scale = 2 if points.metric == "cosine" else 1  # 1 − cos as the squared distance of unit vectors
        for rows, block in points.blocks():
            weights = None if points.weights is None else points.weights[rows]
            found = kmeans_distances(
                block, centroids, self.assignment[rows], weights=weights, metric=points.metric
            )
            self.distance[rows] = found.distance
            total += found.inertia
        self.distance.mul_(scale)
        self.inertia = scale * float(total)
        rounding = 1 + (points.dim / 2 + 4) * torch.finfo(points.dtype).eps
        upper = self.distance.sqrt().mul_(rounding).add_(self._slack)
        return (upper >= safe).nonzero()[:, 0]

    def _search(self, rows: Tensor, centroids: Tensor) -> int:
        assert self.lower is not None
        changed = 0
        points, whole = self.points, len(rows) == self.points.n and self.points.frame.plain
        scale = 2 if points.metric == "cosine" else 1
        for part in _split(rows, len(rows) if whole else points.rows_at_once()):
            x = points.x if whole else points.rows(part)
            found = kmeans_assign(x, centroids, metric=points.metric, top=2)
            self.lower[part] = self._length(found.distance[:, 1]) * self._down - self._slack
            nearest, near = found.assignment[:, 0], found.distance[:, 0].to(points.dtype) * scale
            gained = near.double() if self.begun else near.double() - self.distance[part].double()
            self.inertia += float(gained.sum() if points.weights is None else gained @ points.weights[part])
            self.distance[part] = near
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
    scale = 2 if points.metric == "cosine" else 1
    for rows, block in points.blocks():
        found[rows] = (
            scale
            * kmeans_distances(block, centroids, assignment[rows], metric=points.metric).distance.double()
        )
    return found
