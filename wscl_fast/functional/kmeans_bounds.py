"""Lloyd's iteration with Hamerly's bounds: one pass that skips what cannot have changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.chunked.kmeans import BLOCK_ELEMENTS, cluster_counts, unit
from wscl_fast.functional._checks import check_device, check_matrix, check_tensor, check_vector
from wscl_fast.functional._inputs import Impl
from wscl_fast.functional.kmeans import (
    Metric,
    check_finite,
    check_problem,
    check_weights,
    kmeans_assign,
    kmeans_distances,
)
from wscl_fast.scatter import add_rows

__all__ = [
    "BoundedUpdate",
    "add_to_sums",
    "bounds_are_fused",
    "kmeans_update_bounded",
    "loosen",
    "movement",
    "sums_are_on_a_grid",
]


_GRID = 1.5 * 2.0**12  # added and taken off again it leaves multiples of 2⁻⁴⁰, as the kernels sum


class BoundedUpdate(NamedTuple):
    """What :func:`kmeans_update_bounded` returns."""

    counts: Tensor  # int64 [K], or float64 with weights
    inertia: Tensor  # float64, 0-dim
    peak: float  # the largest number that went in or out of the sums
    changed: int  # points that went to another cluster
    searched: int  # points that met every centroid
    by_half: int  # points of which `half` alone told that they stay


@torch.no_grad()
def kmeans_update_bounded(
    x: Tensor,
    centroids: Tensor,
    assignment: Tensor,
    distance: Tensor,
    lower: Tensor,
    sums: Tensor,
    *,
    previous: Tensor | None = None,
    half: Tensor | None = None,
    weights: Tensor | None = None,
    metric: Metric = "euclidean",
    impl: Impl = "auto",
) -> BoundedUpdate:
    """:func:`kmeans_update` for centroids that moved a little, with bounds of the last pass to go by.

    Leaves in `assignment`, `distance` and `sums`, and returns, what ``kmeans_update(x, centroids)`` finds,
    but without a search for points whose nearest centroid cannot have changed. Of each point `lower` bounds
    the distance from all centroids but its own; centroids that move loosen it by no more than the farthest of
    them went. A point is safe while its distance from its own centroid, which is taken anew where that moved,
    is below that, or below half the distance from its centroid to the next one. The fused kernels let the
    others meet the centroids that moved farthest first, and drop them as soon as the rest cannot matter any
    more.

    Tensors only: what is renewed in place has to be the caller's own memory, which an array's copy is not.

    Sums are kept by what joins and leaves a cluster, so they carry the rounding (float64) of all passes; with
    `peak` a caller can tell when to sum afresh.

    Args:
        x: points ``[N, d]``, as for :func:`kmeans_update`.
        centroids: ``[K, d]``, on the same device.
        assignment: the last pass' clusters, int64 ``[N]`` (−1 for none in the first), contiguous; renewed in
            place.
        distance: the last pass' distances ``[N]`` as :func:`kmeans_assign` returns them, contiguous; NaN
            where it is not known, since the point moved (and `lower` was loosened by that). Renewed in place.
        lower: the last pass' bounds ``[N]``, in the dtype of the computation (float64 where an input is, else
            float32), contiguous; lengths, not squares, of unit vectors when cosine. Renewed in place.
        sums: float64 ``[K, d]``, of the points by their last clusters, contiguous; renewed in place.
        previous: the centroids of the last pass ``[K, d]``; ``None`` for the first: every point is searched
            and `distance` and `lower` are only written.
        half: at most half the distance of each centroid from the next one ``[K]``, in the dtype of `lower`.
        weights: of the points, ``[N]``, at least 0; ``None`` for 1 each.
        metric: as in :func:`kmeans_assign`.
        impl: ``"fused"`` (C++ kernels, CPU), ``"chunked"`` (plain PyTorch), or ``"auto"``: fused where there
            are kernels, else put together from :func:`kmeans_distances` and :func:`kmeans_assign`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a tensor to be renewed is not contiguous, a weight
            is negative, or a row of ``centroids``, or one of ``x`` that has to be read, is not finite.
        RuntimeError: ``assignment`` names no centroid; ``impl="fused"`` where the extension was not built or
            does not serve the device.

    Source: Hamerly, *Making k-means even faster*, SDM 2010.
    """
    x, centroids, dtype = check_problem(x, centroids, metric, impl)
    check_vector("assignment", assignment, len(x), x, integer=True, other="x")
    check_vector("distance", distance, len(x), x, integer=False, other="x")
    check_vector("lower", lower, len(x), x, integer=False, other="x")
    for name, tensor, shape, wanted in (
        ("assignment", assignment, (len(x),), torch.int64),
        ("distance", distance, (len(x),), dtype),
        ("lower", lower, (len(x),), dtype),
        ("sums", sums, tuple(centroids.shape), torch.float64),
    ):
        check_tensor(name, tensor)
        if tensor.dtype != wanted:
            raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
        check_device(name, tensor, x, other="x")
    if previous is not None:
        check_matrix("previous", previous)
        if previous.shape != centroids.shape:
            raise ValueError(
                f"previous: expected shape {tuple(centroids.shape)} as centroids, got {tuple(previous.shape)}"
            )
        check_device("previous", previous, x, other="x")
        previous = previous.to(dtype)
    if half is not None:
        check_vector("half", half, len(centroids), x, integer=False, other="x")
        half = half.to(dtype)
    weights = check_weights(weights, x)
    if impl == "fused" or (impl == "auto" and bounds_are_fused(x.device, dtype)):
        counts, inertia, peak, numbers = _ops.kmeans_update_bounded(
            x,
            centroids,
            assignment,
            distance,
            lower,
            sums,
            previous=previous,
            half=half,
            weights=weights,
            cosine=metric == "cosine",
        )
        return BoundedUpdate(counts, inertia, peak, *numbers)
    return _Pass(x, centroids, assignment, distance, lower, sums, weights, metric, impl).run(previous, half)


def bounds_are_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bounds are kept inside the pass over the points, where they cost next to nothing."""
    return _ops.kmeans_serves(device, dtype, "kmeans_update_bounded")


def sums_are_on_a_grid(device: torch.device, dtype: torch.dtype, metric: Metric) -> bool:
    """Whether unit vectors are rounded as :func:`kmeans_update` says; without weights sums are exact."""
    return metric == "cosine" and dtype != torch.float64 and bounds_are_fused(device, torch.float32)


def add_to_sums(
    sums: Tensor, x: Tensor, clusters: Tensor, *, weights: Tensor | None = None, metric: Metric = "euclidean"
) -> None:
    """Adds points to the sums of their clusters as :func:`kmeans_update` does, in place, in a fixed order."""
    rows = unit(x) if metric == "cosine" else x.double()
    if sums_are_on_a_grid(x.device, x.dtype, metric):
        rows = (rows + _GRID) - _GRID
    add_rows(sums, clusters, rows if weights is None else rows * weights[:, None])


def movement(centroids: Tensor, previous: Tensor, metric: Metric) -> Tensor:
    """How far each centroid went, float64 ``[K]``; between unit vectors when cosine."""
    if metric != "cosine":
        apart: Tensor = (centroids.double() - previous.double()).norm(dim=1)
        return apart
    here, there = unit(centroids), unit(previous)
    moved: Tensor = (here - there).norm(dim=1)
    # Without a direction, whatever the distances were, they are others now.
    undirected = (here == 0).all(dim=1) | (there == 0).all(dim=1)
    return moved.masked_fill(undirected & (moved > 0), 2)


def loosen(lower: Tensor, moved: Tensor, assignment: Tensor, rounding: float) -> None:
    """Takes off each point's bound, in place, what any centroid but its own may have come nearer.

    `moved` is each centroid's :func:`movement`, `rounding` the relative error of a step.
    """
    farthest = moved.argmax()
    others = moved.clone()
    others[farthest] = 0
    other = torch.where(
        torch.arange(len(moved), device=moved.device) == farthest, others.max(), moved[farthest]
    )
    lower.sub_((other * (1 + rounding)).to(lower)[assignment])
    lower.sub_(lower.abs(), alpha=rounding)


class _Pass:
    """The same out of distances, a comparison, and a search of the rows that it leaves."""

    def __init__(
        self,
        x: Tensor,
        centroids: Tensor,
        assignment: Tensor,
        distance: Tensor,
        lower: Tensor,
        sums: Tensor,
        weights: Tensor | None,
        metric: Metric,
        impl: Impl,
    ) -> None:
        self.x, self.centroids, self.assignment, self.lower = x, centroids, assignment, lower
        self.sums, self.weights, self.metric, self.impl = sums, weights, metric, impl
        self.distance = distance
        eps = torch.finfo(lower.dtype).eps
        self.rounding = 4 * eps
        self.short = x.shape[1] * torch.finfo(lower.dtype).tiny * eps
        self.slack = 8 * eps if metric == "cosine" else 0.0
        self.beyond = torch.finfo(lower.dtype).max
        self.peak, self.changed, self.by_half = 0.0, 0, 0

    def run(self, previous: Tensor | None, half: Tensor | None) -> BoundedUpdate:
        check_finite("x", self.x)  # before rows are picked, whose numbers are others
        inertia = self.sums.new_zeros(())
        if previous is None:
            rows = torch.arange(len(self.x), device=self.x.device)
        else:
            moved = movement(self.centroids, previous, self.metric)
            loosen(self.lower, moved, self.assignment, self.rounding)
            rows, inertia = self._undecided(half)
        for part in self._parts(rows):
            inertia = inertia + self._search(part, anew=previous is None)
        if bool((self.distance >= self.beyond).any()):  # what is kept is less than they are
            inertia = kmeans_distances(
                self.x,
                self.centroids,
                self.assignment,
                weights=self.weights,
                metric=self.metric,
                impl=self.impl,
            ).inertia
        counts = cluster_counts(self.assignment, self.weights, len(self.centroids))
        return BoundedUpdate(counts, inertia, self.peak, self.changed, len(rows), self.by_half)

    def _undecided(self, half: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows whose bounds do not tell their cluster, and the inertia if all stayed where they are."""
        found = kmeans_distances(
            self.x, self.centroids, self.assignment, weights=self.weights, metric=self.metric, impl=self.impl
        )
        self.distance.copy_(found.distance)
        # Squares of tiny numbers leave float32's range before their roots do.
        square = self.distance if self.metric == "euclidean" else 2 * self.distance
        rounding = 1 + (self.x.shape[1] / 2 + 4) * torch.finfo(self.lower.dtype).eps
        upper = square.sqrt().mul_(rounding).add_(self.slack)
        known = (square > torch.finfo(square.dtype).tiny) & (square < self.beyond)
        safe = (upper < self.lower) & known
        if half is not None:
            near = (upper < half[self.assignment]) & known & ~safe
            self.by_half = int(near.sum())
            safe |= near
        return (~safe).nonzero()[:, 0], found.inertia

    def _search(self, rows: Tensor, *, anew: bool) -> Tensor:
        """The nearest centroids of some rows; returns what the inertia gains."""
        x = self.x if len(rows) == len(self.x) else self.x[rows]
        found = kmeans_assign(
            x, self.centroids, metric=self.metric, top=min(2, len(self.centroids)), impl=self.impl
        )
        nearest, near = found.assignment.view(len(rows), -1)[:, 0], found.distance.view(len(rows), -1)
        if near.shape[1] == 2:
            other = near[:, 1] if self.metric == "euclidean" else 2 * near[:, 1]
            # Below the normal range a square is short of digits, each summand's by as much.
            other = (other.to(self.lower) - self.short).clamp_(min=0)
            self.lower[rows] = other.sqrt() * (1 - self.rounding) - self.slack
        else:
            self.lower[rows] = torch.inf
        near = near[:, 0].to(self.distance)
        gained = near.double() if anew else near.double() - self.distance[rows].double()
        self.distance[rows] = near
        other_rows = (nearest != self.assignment[rows]).nonzero()[:, 0]
        for part in self._parts(other_rows):
            self._move(rows[part], nearest[part])
        self.changed += len(other_rows)
        return gained.sum() if self.weights is None else gained @ self.weights[rows]

    def _move(self, rows: Tensor, clusters: Tensor) -> None:
        values = self.x[rows].double()
        if self.metric == "cosine":
            values = unit(values)
        if self.weights is not None:
            values = values * self.weights[rows, None]
        add_rows(self.sums, clusters, values)
        before = self.assignment[rows]
        had = before >= 0
        add_rows(self.sums, before[had], -values[had])
        self.assignment[rows] = clusters
        self.peak = max(self.peak, float(values.abs().max()))

    def _parts(self, rows: Tensor) -> Iterator[Tensor]:
        elements = BLOCK_ELEMENTS.get(rows.device.type, BLOCK_ELEMENTS["cpu"])
        step = max(64, elements // max(1, self.x.shape[1]))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]
