"""The pieces of k-means: assignment, seeding, and Lloyd's iteration. Memory beyond the data is one block.

Points and centroids are float32 or float64 tensors on one device, checked by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.functional import kmeans_assign

METRICS = ("euclidean", "cosine")

# Elements of the widest temporary: about what a CPU's cache holds; enough rows to fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


class Clustering(NamedTuple):
    """Where Lloyd's iteration ended."""

    centroids: Tensor  # [K, d]
    assignment: Tensor  # int64 [n]
    inertia: float
    n_iter: int


def check_metric(metric: str) -> str:
    """The metric, if it is one."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    return metric


def assign(x: Tensor, centroids: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """:func:`wscl_fast.functional.kmeans_assign`, with `2 − 2 cos` for the cosine.

    Args:
        x: points, float32 or float64 [n, d].
        centroids: same dtype and device [K, d].
        metric: "euclidean" or "cosine".

    Returns:
        The assignment, int64 [n], and the squared distance, dtype of x [n].
    """
    cosine = check_metric(metric) == "cosine"
    assignment, distance = kmeans_assign(x, centroids, metric="cosine" if cosine else "euclidean")
    return assignment, 2 * distance if cosine else distance


@torch.no_grad()
def seed_points(x: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Indices of the points that k-means++ starts from, int64 [n_clusters].

    Each next point is drawn with probability proportional to its squared distance from those chosen; of
    `2 + ⌊log K⌋` such draws the one that lowers the sum of squared distances most is kept, as in
    scikit-learn. `x` should be centred. `generator` lives on the CPU, so that a seed means the same on
    every device.

    Source: Arthur & Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007.
    """
    n = len(x)
    trials = 2 + int(math.log(n_clusters))
    norms = x.square().sum(dim=1)
    chosen = torch.empty(n_clusters, dtype=torch.int64, device=x.device)
    chosen[0] = int(torch.randint(n, (), generator=generator))
    nearest = torch.full_like(norms, math.inf)
    candidates = chosen[:1]
    for i in range(n_clusters):
        if i > 0:
            cumulative = nearest.cumsum(dim=0, dtype=torch.float64)
            draws = torch.rand(trials, dtype=torch.float64, generator=generator).to(x.device) * cumulative[-1]
            candidates = torch.searchsorted(cumulative, draws, right=True).clamp_(max=n - 1)
        with torch.autocast(x.device.type, enabled=False):
            distance = torch.addmm(norms[candidates], x, x[candidates].T, alpha=-2)  # [n, trials]
        distance.add_(norms[:, None]).clamp_(min=0)
        torch.minimum(distance, nearest[:, None], out=distance)
        best = distance.sum(dim=0, dtype=torch.float64).argmin()
        chosen[i] = candidates[best]
        nearest = distance[:, best].contiguous()
        nearest[chosen[i]] = 0
    return chosen


@torch.no_grad()
def lloyd(x: Tensor, centroids: Tensor, *, spherical: bool, max_iter: int, tolerance: float) -> Clustering:
    """Lloyd's iteration: assign, average, until no assignment changes or the centroids stand still.

    Equals, repeated, `z, _ = assign(x, c); c = torch.stack([x[z == k].mean(0) for k in range(K)])`.
    A cluster that lost its points takes one of those farthest from their centroids. When spherical, the
    points are unit vectors and centroids are scaled to length 1 (their nearest is then the one of highest
    cosine).

    Args:
        x: points, float32 or float64 [n, d].
        centroids: where to start, [K, d].
        spherical: keep the centroids on the unit sphere.
        max_iter: most passes over the data.
        tolerance: stop when the squared movement of all centroids together is at most this.
    """
    previous: Tensor | None = None
    n_iter = 0
    while True:
        n_iter += 1
        assignment, distance = assign(x, centroids)
        if previous is not None and torch.equal(assignment, previous):
            break
        moved = _update(x, centroids, assignment, distance, spherical=spherical)
        movement = float((moved - centroids).square().sum())
        centroids, previous = moved, assignment
        if movement <= tolerance or n_iter == max_iter:
            assignment, _ = assign(x, centroids)
            break
    return Clustering(centroids, assignment, inertia(x, centroids, assignment), n_iter)


@torch.no_grad()
def inertia(x: Tensor, centroids: Tensor, assignment: Tensor) -> float:
    """Sum of squared distances of the points from their centroids, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in _blocks(x, width=x.shape[1]):
        total += (x[rows].double() - centroids[assignment[rows]].double()).square().sum()
    return float(total)


def _update(x: Tensor, centroids: Tensor, assignment: Tensor, distance: Tensor, *, spherical: bool) -> Tensor:
    """The mean of each cluster's points, or its direction."""
    n_clusters = len(centroids)
    counts = torch.bincount(assignment, minlength=n_clusters)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    for rows in _blocks(x, width=x.shape[1]):
        points, ids = x[rows].double(), assignment[rows]
        if x.is_cuda:  # sorted accumulation: the same sum in every run, which atomics do not promise
            sums.index_put_((ids,), points, accumulate=True)
        else:
            sums.scatter_add_(0, ids[:, None].expand(-1, x.shape[1]), points)
    if bool((counts == 0).any()):
        _fill_empty(x, assignment, distance, sums, counts)
    length = sums.norm(dim=1, keepdim=True) if spherical else counts[:, None].double()
    # A cluster that stays empty, or whose directions cancel, has no mean: it stays where it was.
    usable = length > torch.finfo(torch.float64).eps * counts[:, None]
    return torch.where(usable, sums / length.where(usable, 1), centroids.double()).to(x.dtype)


def _fill_empty(x: Tensor, assignment: Tensor, distance: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Move the points farthest from their centroids into the empty clusters, at most one cluster a point."""
    empty = (counts == 0).nonzero()[:, 0].tolist()
    # Twice as many candidates as needed, since the only point of a cluster must stay in it.
    farthest = distance.topk(min(2 * len(empty), len(x))).indices.tolist()
    for point in farthest:
        if not empty:
            break
        donor = int(assignment[point])
        if counts[donor] < 2:
            continue
        target = empty.pop(0)
        sums[donor] -= x[point].double()
        sums[target] = x[point].double()
        counts[donor] -= 1
        counts[target] = 1


def _blocks(x: Tensor, width: int) -> Iterator[slice]:
    elements = _BLOCK_ELEMENTS.get(x.device.type, _BLOCK_ELEMENTS["cpu"])
    rows = max(64, elements // max(1, width))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)
