"""Lloyd's iteration: assign every sample, average every cluster, until nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.bounds import Bounds
from wscl_fast.clustering.empty import fill_empty, split_largest
from wscl_fast.clustering.points import Points, unit
from wscl_fast.clustering.search import Search, Step
from wscl_fast.clustering.sharded_search import ShardedSearch
from wscl_fast.clustering.shards import Shards

ALGORITHMS = ("auto", "lloyd", "hamerly")
_LOWER = 1 - 2.0**-30  # sums of float32's distances in another order come out within that


class Clustering(NamedTuple):
    """Where Lloyd's iteration ended; everything as the points' frame sees it."""

    centroids: Tensor  # [K, d]
    assignment: Tensor  # int64 [n], of this rank's rows
    counts: Tensor  # int64 [K], or float64 with weights, of all ranks
    inertia: float
    history: list[float]  # the inertia of each pass over the data, the last included
    n_iter: int
    bounds: Bounds | None  # those of the last pass, to carry on with


def is_better(run: Clustering, best: Clustering | None) -> bool:
    """Whether a run ended lower than the best of those before it, by more than rounding may tell.

    Runs often end in the same clusters under other numbers. Of those the first is kept, however samples are
    cut into blocks or ranks, and whatever bounds spare.
    """
    return best is None or run.inertia < best.inertia * _LOWER


class Progress(NamedTuple):
    """How far a run has come."""

    n_iter: int = 0
    history: tuple[float, ...] | list[float] = ()
    ended: bool = False  # nothing moves any more, or `max_iter` is reached: one last pass is left


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
    shards: Shards | None = None,
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
        shards: who holds which centroids; `centroids`, those reported and those returned are then the shard
            of this rank. Bounds do not come along from earlier runs.
        report: called after each update with the centroids that come next, and how far the run has come.
    """
    search = Search(points, algorithm, bounds) if shards is None else ShardedSearch(points, shards, algorithm)
    n_iter, sofar, ended = begin or Progress()
    history = list(sofar)
    while not ended:
        n_iter += 1
        step = search(centroids)
        history.append(step.inertia)
        if n_iter > 1 and step.changed == 0:
            break
        moved = next_centroids(points, centroids, step, empty, shards)
        square = (moved.double() - centroids.double()).square().sum()
        movement = float(square if shards is None else points.ranks.sum(square))
        centroids = moved
        ended = movement <= tolerance or n_iter >= max_iter
        if report is not None:
            report(centroids, Progress(n_iter, history, ended))
    else:
        step = search(centroids)
        history.append(step.inertia)
    return Clustering(centroids, step.assignment, step.counts, step.inertia, history, n_iter, search.bounds)


def next_centroids(
    points: Points, centroids: Tensor, step: Step, empty: str, shards: Shards | None = None
) -> Tensor:
    """The mean of each cluster's points, or its direction; one that has none stays where it was."""
    sums, counts = step.sums, step.counts.double()
    missing = not bool(counts.all())
    if missing and empty == "farthest":
        first = 0 if shards is None else shards.own.start
        sums, counts = fill_empty(points, step.assignment, step.distance, sums, counts, first)
    if shards is not None:
        counts = counts[shards.own]
    if points.metric == "cosine":
        length = sums.norm(dim=1, keepdim=True)
        # Directions that cancel have no mean; where all have left, their sum may have kept some rounding.
        usable = (counts[:, None] > 0) & (length > torch.finfo(torch.float64).eps * counts[:, None])
        moved = torch.where(usable, unit(sums), centroids.double())
    elif not missing:
        moved = sums / counts[:, None]
    else:
        usable = counts[:, None] > 0
        moved = torch.where(usable, sums / counts[:, None].where(usable, 1), centroids.double())
    moved = moved.to(centroids.dtype)
    if missing and empty == "split":
        moved = split_largest(points, moved, step.assignment, counts)
    return moved
