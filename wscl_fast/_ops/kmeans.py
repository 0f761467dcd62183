"""The k-means operators; what they compute is said in ``csrc/core/kmeans.h``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wscl_fast._ops.extension import extension, obstacle, require
from wscl_fast._ops.registration import register_fake

# The precision of the product that proposes candidates; the results do not depend on it.
Candidates = Literal["auto", "full", "bfloat16"]
_NUMBERS: dict[Candidates, int] = {"auto": 0, "full": 1, "bfloat16": 2}

MOST_TOP = 8  # csrc/core/kmeans.h


def kmeans_assign(
    x: Tensor,  # [N, d]
    centroids: Tensor,  # [K, d] float32 or float64
    *,
    cosine: bool,
    top: int = 1,
    candidates: Candidates = "auto",
) -> tuple[Tensor, Tensor]:
    """The `top` nearest centroids and their distances ``[N, top]`` of every row, by the fused kernels."""
    require(x.device, centroids.dtype, "kmeans_assign")
    assignment, distance, bad_row = torch.ops.wscl_fast.kmeans_assign(
        x, centroids, cosine, top, _NUMBERS[candidates]
    )
    _refuse(bad_row)
    return assignment, distance


def kmeans_update(
    x: Tensor,  # [N, d]
    centroids: Tensor,  # [K, d] float32 or float64
    *,
    weights: Tensor | None,  # [N] float64
    cosine: bool,
    candidates: Candidates = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Assignment, distance, sums ``[K, d]``, counts ``[K]`` and inertia, by the fused kernels."""
    require(x.device, centroids.dtype, "kmeans_update")
    d = x.shape[1]
    if not d:  # sums without memory are taken for none asked for, and counts then are not made either
        x, centroids = x.new_zeros(len(x), 1), centroids.new_zeros(len(centroids), 1)
    *results, bad_row = torch.ops.wscl_fast.kmeans_update(x, centroids, weights, cosine, _NUMBERS[candidates])
    _refuse(bad_row)
    assignment, distance, sums, counts, inertia = results
    return assignment, distance, sums if d else sums[:, :0], counts, inertia


def kmeans_distances(
    x: Tensor,  # [N, d]
    centroids: Tensor,  # [K, d] float32 or float64
    assignment: Tensor,  # int64 [N]
    *,
    weights: Tensor | None,  # [N] float64
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """The distance of every row from its centroid ``[N]``, and the inertia, by the fused kernels."""
    require(x.device, centroids.dtype, "kmeans_distances")
    distance, inertia = torch.ops.wscl_fast.kmeans_distances(x, centroids, assignment, weights, cosine)
    return distance, inertia


def kmeans_potentials(
    x: Tensor,  # [N, d]
    candidates: Tensor,  # [m, d] float32 or float64
    nearest: Tensor,  # [N], the dtype of the candidates
    *,
    scale: Tensor | None,  # [N], the dtype of the candidates
    weights: Tensor | None,  # [N] float64
) -> tuple[Tensor, Tensor]:
    """What :func:`wscl_fast.functional.kmeans_potentials` says, by the fused kernels."""
    require(x.device, candidates.dtype, "kmeans_potentials")
    distance, potential = torch.ops.wscl_fast.kmeans_potentials(x, candidates, nearest, scale, weights)
    return distance, potential


def kmeans_update_bounded(
    x: Tensor,  # [N, d]
    centroids: Tensor,  # [K, d] float32 or float64
    assignment: Tensor,  # int64 [N], renewed in place
    distance: Tensor,  # [N] of the centroids' dtype, renewed in place
    lower: Tensor,  # [N] of the centroids' dtype, renewed in place
    sums: Tensor,  # float64 [K, d], renewed in place
    *,
    previous: Tensor | None,  # [K, d]
    half: Tensor | None,  # [K]
    weights: Tensor | None,  # [N] float64
    cosine: bool,
    candidates: Candidates = "auto",
) -> tuple[Tensor, Tensor, float, list[int]]:
    """Counts, inertia, peak, and how many changed, were searched, stayed by `half`: fused."""
    require(x.device, centroids.dtype, "kmeans_update_bounded")
    *results, tally = torch.ops.wscl_fast.kmeans_update_bounded(
        x, centroids, assignment, distance, lower, sums, previous, half, weights, cosine, _NUMBERS[candidates]
    )
    *numbers, bad_row = tally.tolist()
    _refuse_row(bad_row)
    counts, inertia, peak = results
    return counts, inertia, float(peak), numbers


def kmeans_serves(device: torch.device, dtype: torch.dtype, operator: str) -> bool:
    """Whether an operator's fused kernels run on this device, for centroids of this dtype."""
    return not obstacle(device, dtype, operator)


def _refuse(bad_row: Tensor) -> None:
    """On a GPU the only time that the host waits: an error cannot be raised any later."""
    if isinstance(bad_row, torch._subclasses.FakeTensor) or torch.compiler.is_compiling():
        return
    _refuse_row(int(bad_row))


def _refuse_row(row: int) -> None:
    if row >= 0:
        raise ValueError(f"x: expected finite numbers, got NaN or infinity in row {row}")


def _fake_assign(
    x: Tensor, centroids: Tensor, cosine: bool, top: int, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(len(x), top, dtype=torch.int64),
        centroids.new_empty(len(x), top),
        x.new_empty((), dtype=torch.int64),
    )


def _fake_update(
    x: Tensor, centroids: Tensor, weights: Tensor | None, cosine: bool, candidates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, d = centroids.shape
    return (
        x.new_empty(len(x), dtype=torch.int64),
        centroids.new_empty(len(x)),
        x.new_empty(k, d, dtype=torch.float64),
        x.new_empty(k, dtype=torch.int64 if weights is None else torch.float64),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((), dtype=torch.int64),
    )


def _fake_update_bounded(
    x: Tensor,
    centroids: Tensor,
    assignment: Tensor,
    distance: Tensor,
    lower: Tensor,
    sums: Tensor,
    previous: Tensor | None,
    half: Tensor | None,
    weights: Tensor | None,
    cosine: bool,
    candidates: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(len(centroids), dtype=torch.int64 if weights is None else torch.float64),
        x.new_empty((), dtype=torch.float64),
        x.new_empty((), dtype=torch.float64),
        x.new_empty(4, dtype=torch.int64),
    )


def _fake_distances(
    x: Tensor, centroids: Tensor, assignment: Tensor, weights: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor]:
    return centroids.new_empty(len(x)), x.new_empty((), dtype=torch.float64)


def _fake_potentials(
    x: Tensor, candidates: Tensor, nearest: Tensor, scale: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    m = len(candidates)
    return candidates.new_empty(m, len(x)), candidates.new_empty(m, dtype=torch.float64)


if extension is not None:
    register_fake("kmeans_distances", _fake_distances)
    register_fake("kmeans_potentials", _fake_potentials)
    register_fake("kmeans_assign", _fake_assign)
    register_fake("kmeans_update", _fake_update)
    register_fake("kmeans_update_bounded", _fake_update_bounded)
