"""Hamerly's bounds: which samples cannot have changed their cluster, from how far the centroids moved.

What is kept from pass to pass; a pass itself is `kmeans_update_bounded`. Bounds are rounded outwards, so that
no assignment differs from that of a full search.

Source: Hamerly, *Making k-means even faster*, SDM 2010. New here: samples may move as well, by a known
distance each, so that the bounds of one epoch's clustering serve the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.base import NO_CLUSTER
from wscl_fast.clustering.points import Points
from wscl_fast.functional import kmeans_assign, kmeans_distances, kmeans_update_bounded
from wscl_fast.functional.kmeans_bounds import add_to_sums, sums_are_on_a_grid


class Carried(NamedTuple):
    """What one fit leaves to the next."""

    assignment: Tensor  # int64 [n]
    lower: Tensor  # [n], bound of the distance to any other
    centroids: Tensor  # [K, d] that they were taken to
    metric: str

    def fits(self, points: Points) -> bool:
        """Whether the bounds are of as many samples, in their metric and dtype."""
        alike = self.metric == points.metric and self.lower.dtype == points.dtype
        return alike and len(self.assignment) == points.n


class Bounds:
    """Bounds of the distances of this rank's rows, and the sums of their clusters, kept as rows change.

    Args:
        points: the samples.
        n_clusters: K.
        assignment: int64 [n], a cluster of each sample; None where there is none yet.
        sums: float64 [K, d], the sums of these clusters' rows.
    """

    def __init__(
        self, points: Points, n_clusters: int, assignment: Tensor | None = None, sums: Tensor | None = None
    ) -> None:
        self.points = points
        device, n = points.device, points.n
        if assignment is None or sums is None:
            self.assignment = torch.full((n,), NO_CLUSTER, device=device)
            self.sums = torch.zeros(n_clusters, points.dim, dtype=torch.float64, device=device)
        else:
            self.assignment, self.sums = assignment.clone(), sums.clone()
        self.lower = torch.empty(n, dtype=points.dtype, device=device)
        self.centroids: Tensor | None = None  # that the bounds were taken to
        self._apart = torch.empty(n, dtype=points.dtype, device=device)  # from the own
        self.counts = self.sums.new_zeros(n_clusters)
        self.inertia = 0.0  # of this rank's rows
        self.searched = 0  # rows that the last search had to look at in full
        self.begun = True  # whether the last search had no bounds to go by
        self._halves = True  # whether half the distance between centroids has told anything
        self._moves, self._peak = 0, 0.0  # rows that joined or left the sums, and their largest number
        grid = sums_are_on_a_grid(device, points.dtype, points.metric)
        self._exact = grid and points.weights is None  # sums, whatever came and went
        self._down = 1 - 4 * torch.finfo(points.dtype).eps

    def search(self, centroids: Tensor) -> int:
        """Bring every assignment, distance and sum up to date; returns how many assignments changed."""
        points, previous = self.points, self.centroids
        self.begun = previous is None
        half = self._half(centroids)
        scale = 2 if points.metric == "cosine" else 1  # 1 − cos as the squared distance of unit vectors
        counts: Tensor | None = None
        inertia = 0.0
        changed = by_half = self.searched = 0
        for rows, block in points.blocks():
            whole = len(block) == points.n
            found = kmeans_update_bounded(
                block,
                centroids,
                self.assignment if whole else self.assignment[rows],
                self._apart if whole else self._apart[rows],
                self.lower if whole else self.lower[rows],
                self.sums,
                previous=previous,
                half=half,
                weights=None if points.weights is None else points.weights[rows],
                metric=points.metric,
            )
            counts = found.counts if counts is None else counts + found.counts
            inertia += float(found.inertia)
            changed, by_half = changed + found.changed, by_half + found.by_half
            self.searched += found.searched
            self._peak = max(self._peak, found.peak)
        self.counts = torch.zeros_like(self.counts) if counts is None else counts
        self.inertia, self.centroids = scale * inertia, centroids
        self._halves = self._halves and (self.begun or by_half > 0)
        self._moves += changed
        if changed:
            self._tidy()
        return changed

    @property
    def distance(self) -> Tensor:
        """Squared distance of each row from its centroid [n]."""
        return 2 * self._apart if self.points.metric == "cosine" else self._apart

    def carry(self) -> Carried | None:
        """What the next fit can use, or None where nothing was searched."""
        if self.centroids is None:
            return None
        # What the fit gives out shares no memory with it: a user may write there.
        return Carried(self.assignment.clone(), self.lower, self.centroids.clone(), self.points.metric)

    @classmethod
    def resumed(cls, points: Points, carried: Carried, drift: Tensor) -> Bounds:
        """Bounds for samples that moved by at most `drift` [n] each since `carried` was kept."""
        k = len(carried.centroids)
        self = cls(points, k, carried.assignment, cluster_sums(points, carried.assignment, k))
        self.lower = carried.lower - drift.to(carried.lower) * (2 - self._down)
        self.lower.sub_(self.lower.abs(), alpha=1 - self._down)
        self._apart.fill_(torch.nan)
        self.centroids = carried.centroids
        return self

    def _half(self, centroids: Tensor) -> Tensor | None:
        """At most half the distance of each centroid from the next one [K], where that is worth its while."""
        if self.begun or not self._halves or not 16 <= 8 * len(centroids) <= self.points.n_all:
            return None
        near = kmeans_assign(centroids, centroids, metric=self.points.metric, top=2).distance[:, 1]
        near = (2 * near if self.points.metric == "cosine" else near).to(self.points.dtype)
        return near.sqrt() * (0.5 * self._down)

    def _tidy(self) -> None:
        """Sum afresh where what came and went may have left more rounding behind than the clusters bear.

        A sample far outside takes the others' digits with it when it leaves a sum. Unit vectors that the
        kernels sum on a grid (`kmeans_update`) leave nothing behind.
        """
        if not self.begun:
            if self._exact:
                return
            weighted = self.points.weights is not None
            weight = float(self.counts.sum()) if weighted else float(self.points.n)
            if not weight:  # other ranks' rows have some; these left nothing behind
                return
            least = float(self.counts[self.counts > 0].amin()) if weighted else 1.0
            error = 2.0**-53 * self._moves * self._peak / least  # of a mean
            spread = (self.inertia / weight) ** 0.5
            if not error > 2.0**-30 * spread:
                return
            self.sums.copy_(cluster_sums(self.points, self.assignment, len(self.sums)))
        self._moves, self._peak = 0, 0.0


def cluster_sums(points: Points, assignment: Tensor, n_clusters: int) -> Tensor:
    """The weighted sum of each cluster's rows (of their directions when cosine), float64 [K, d]."""
    sums = torch.zeros(n_clusters, points.dim, dtype=torch.float64, device=points.device)
    for rows, block in points.parts():
        weights = None if points.weights is None else points.weights[rows]
        add_to_sums(sums, block, assignment[rows], weights=weights, metric=points.metric)
    return sums


def nearest(points: Points, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row of this rank, int64 [n]."""
    found = torch.empty(points.n, dtype=torch.int64, device=points.device)
    for rows, block in points.blocks():
        found[rows] = kmeans_assign(block, centroids, metric=points.metric).assignment
    return found


def distances(points: Points, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Squared distance of each row of this rank from its centroid, float64 [n]."""
    found = torch.empty(points.n, dtype=torch.float64, device=points.device)
    for rows, block in points.blocks():
        one = kmeans_distances(block, centroids, assignment[rows], metric=points.metric)
        found[rows] = squared(points, block, one.distance).double()
    return found


def squared(points: Points, block: Tensor, distance: Tensor) -> Tensor:
    """What `kmeans_assign` found for a block's rows, [n] or [n, top], as squared distances.

    When cosine, of unit vectors: 2 (1 − cos), but 1 for a zero vector, whose cosine is 0 with all.
    """
    if points.metric != "cosine":
        return distance
    square = 2 * distance
    several = distance.view(len(block), -1)
    maybe = (several[:, 0] == 1).nonzero()[:, 0]
    square[maybe[~block[maybe].any(dim=1)]] = 1
    return square
