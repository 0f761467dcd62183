"""Lloyd's iteration: assign every sample, average every cluster, until nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.bounds import Bounds
from wscl_fast.clustering.empty import fill_empty, split_largest
from wscl_fast.clustering.points import Points, unit
from wscl_fast.functional import kmeans_update
from wscl_fast.functional.kmeans_bounds import bounds_are_fused

ALGORITHMS = ("auto", "lloyd", "hamerly")

# Inside the pass bounds cost next to nothing. Put together from several passes they begin to pay when few
# samples change their cluster; against few clusters of few dimensions a product is as fast as keeping them.
_FEW_CHANGES = 0.1
_LEAST_WORK = 1 << 15  # K · d
_TOO_MANY_SEARCHED = 0.7


class Clustering(NamedTuple):
    """Where Lloyd's iteration ended; everything as the points' frame sees it."""

    centroids: Tensor  # [K, d]
    assignment: Tensor  # int64 [n], of this rank's rows
    counts: Tensor  # int64 [K], or float64 with weights, of all ranks
    inertia: float
    history: list[float]  # the inertia of each pass over the data, the last included
    n_iter: int
    bounds: Bounds | None  # those of the last pass, to carry on with


class Progress(NamedTuple):
    """How far a run has come."""

    n_iter: int = 0
    history: tuple[float, ...] | list[float] = ()
    ended: bool = False  # nothing moves any more, or `max_iter` is reached: one last pass is left


class Step(NamedTuple):
    """One pass over the data."""

    assignment: Tensor
    distance: Tensor  # squared, [n]
    sums: Tensor  # float64 [K, d], of all ranks
    counts: Tensor  # [K], of all ranks
    inertia: float
    changed: int  # samples of all ranks in another cluster than in the pass before


@torch.no_grad()
def lloyd(
    points: Points,
    centroids: Tensor,
    *,
    max_iter: int,
    tolerance: float,
    empty: str = "farthest",
    algorithm: str = "auto",
    bounds: Bounds | None = None,
    begin: Progress | None = None,
    report: Callable[[Tensor, Progress], None] | None = None,
) -> Clustering:
    """Assign and average until no assignment changes or the centroids stand still.

    Equals, repeated, `z, _ = kmeans_assign(x, c); c = torch.stack([x[z == k].mean(0) for k in range(K)])`.
    When the points' metric is cosine, the unit vectors are averaged and centroids scaled to length 1.

    Args:
        points: the samples, of all ranks if sharded; every rank gets the same centroids.
        centroids: where to start [K, d], as the points' frame sees them.
        max_iter: most updates of the centroids.
        tolerance: stop when the squared movement of all centroids together is at most this.
        empty: what becomes of a cluster without samples (`fill_empty`).
        algorithm: "lloyd" searches every sample in every pass; "hamerly" only those whose bounds allow that
            they changed; "auto" takes bounds once they pay. The assignments are the same.
        bounds: those of an earlier run, still true for these points, to begin with.
        begin: how far an earlier call had come when it reported these centroids.
        report: called after each update with the centroids that come next, and how far the run has come.
    """
    search = _Search(points, algorithm, bounds)
    n_iter, sofar, ended = begin or Progress()
    history = list(sofar)
    while not ended:
        n_iter += 1
        step = search(centroids)
        history.append(step.inertia)
        if n_iter > 1 and step.changed == 0:
            break
        moved = next_centroids(points, centroids, step, empty)
        movement = float((moved.double() - centroids.double()).square().sum())
        centroids = moved
        ended = movement <= tolerance or n_iter >= max_iter
        if report is not None:
            report(centroids, Progress(n_iter, history, ended))
    else:
        step = search(centroids)
        history.append(step.inertia)
    return Clustering(centroids, step.assignment, step.counts, step.inertia, history, n_iter, search.bounds)


def next_centroids(points: Points, centroids: Tensor, step: Step, empty: str) -> Tensor:
    """The mean of each cluster's points, or its direction; one that has none stays where it was."""
    sums, counts = step.sums, step.counts.double()
    missing = counts == 0
    if bool(missing.any()) and empty == "farthest":
        sums, counts = fill_empty(points, step.assignment, step.distance, sums, counts)
    if points.metric == "cosine":
        length = sums.norm(dim=1, keepdim=True)
        # Directions that cancel have no mean.
        usable = length > torch.finfo(torch.float64).eps * counts[:, None]
        moved = torch.where(usable, unit(sums), centroids.double())
    else:
        usable = counts[:, None] > 0
        moved = torch.where(usable, sums / counts[:, None].where(usable, 1), centroids.double())
    moved = moved.to(centroids.dtype)
    if bool(missing.any()) and empty == "split":
        moved = split_largest(points, moved, step.assignment, counts)
    return moved


class _Search:
    """Finds each sample's cluster again and again, with bounds once they pay."""

    def __init__(self, points: Points, algorithm: str, bounds: Bounds | None) -> None:
        self.points, self.algorithm = points, algorithm
        self.bounds = bounds
        self.fused = bounds_are_fused(points.device, points.dtype)
        self.last: Step | None = None
        self.assignment: Tensor | None = None  # int64 [n], renewed in place
        self.distance: Tensor | None = None  # [n]
        self.sums: Tensor | None = None  # of this rank's rows, under `last`
        self.rest = 0  # passes to go without bounds
        self.pause = 4

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
        if self.last is None:
            return False
        self.rest -= 1
        few = self.last.changed <= _FEW_CHANGES * self.points.n_all
        return few and n_clusters * dim >= _LEAST_WORK and self.rest < 0

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
        totals = torch.cat([bounds.counts, bounds.counts.new_tensor([bounds.inertia, changed])])
        if self.algorithm == "auto" and not self.fused:
            searched = self.points.ranks.sum(bounds.counts.new_tensor(bounds.searched))
            if not bounds.begun and float(searched) > _TOO_MANY_SEARCHED * self.points.n_all:
                self.bounds, self.rest = None, self.pause
                self.pause *= 2
        self.assignment = bounds.assignment
        return self._shared(bounds.assignment, bounds.distance, totals)

    def _shared(self, assignment: Tensor, distance: Tensor, totals: Tensor) -> Step:
        assert self.sums is not None
        totals, sums = self.points.ranks.sum(totals), self.points.ranks.sum(self.sums)
        counts = totals[:-2] if self.points.weights is not None else totals[:-2].long()
        return Step(assignment, distance, sums, counts, float(totals[-2]), int(totals[-1]))
