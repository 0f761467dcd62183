"""K-means assignment and update: arguments are checked here, and an implementation is chosen."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wscl_fast import _ops, chunked, reference
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import check_choice, check_device, check_int, check_matrix, check_vector
from wscl_fast.functional._inputs import Impl
from wscl_fast.values import is_fake, may_look

__all__ = [
    "Distances",
    "Metric",
    "Nearest",
    "Potentials",
    "Update",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_potentials",
    "kmeans_update",
]

Metric = Literal["euclidean", "cosine"]


class Nearest(NamedTuple):
    """What :func:`kmeans_assign` returns."""

    assignment: Tensor  # int64 [N], or [N, top]
    distance: Tensor  # the same shape


class Update(NamedTuple):
    """What :func:`kmeans_update` returns."""

    assignment: Tensor  # int64 [N]
    distance: Tensor  # [N]
    sums: Tensor  # float64 [K, d]
    counts: Tensor  # int64 [K], or float64 with weights
    inertia: Tensor  # float64, 0-dim


class Distances(NamedTuple):
    """What :func:`kmeans_distances` returns."""

    distance: Tensor  # [N]
    inertia: Tensor  # float64, 0-dim


class Potentials(NamedTuple):
    """What :func:`kmeans_potentials` returns."""

    distance: Tensor  # [m, N]
    potential: Tensor  # float64 [m]


@takes_arrays
@torch.no_grad()
def kmeans_assign(
    x: Tensor,
    centroids: Tensor,
    *,
    metric: Metric = "euclidean",
    top: int = 1,
    impl: Impl = "auto",
) -> Nearest:
    """The nearest centroid of each point, or the `top` nearest, without the N × K matrix.

    Equals, in float64 (after ``normalize``, and halved, for the cosine),

        distance, assignment = torch.cdist(x.double(), centroids.double()).square().min(dim=1)

    and is exact: fast products only propose candidates, and every call that is closer than their rounding
    error is decided by ``‖x − c‖²`` in float64. Of equally near centroids the lowest index wins, also far
    from the origin and at any scale.

    Args:
        x: points ``[N, d]``, any floating-point dtype and strides.
        centroids: ``[K, d]``, on the same device.
        metric: ``"euclidean"`` for the squared distance ``‖x − c‖²``; ``"cosine"`` for ``1 − cos(x, c)``,
            where the cosine of a zero vector, which has no direction, is 0.
        top: how many centroids to return, nearest first. At 1 the results are vectors.
        impl: ``"fused"`` (C++ kernels; on CUDA not for float64), ``"chunked"`` (plain PyTorch, memory linear
            in N + K), ``"reference"`` (the definition, N × K), or ``"auto"``, the best that works.

    Returns:
        ``assignment``, int64 ``[N]`` or ``[N, top]``, and ``distance`` of the same shape: float64 where an
        input is, else float32; a distance beyond the dtype's range is the dtype's largest number.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a value is out of range, or a row of ``x`` or
            ``centroids`` is not finite.
        RuntimeError: ``impl="fused"`` where the extension was not built, does not serve the device, or where
            ``top`` is more than 8.
    """
    x, centroids, dtype = check_problem(x, centroids, metric, impl)
    top = check_int("top", top)
    if not 1 <= top <= len(centroids):
        raise ValueError(f"top: expected 1 to the number of centroids ({len(centroids)}), got {top}")
    cosine = metric == "cosine"
    if impl == "fused" and top > _ops.MOST_TOP:
        raise RuntimeError(
            f"impl='fused' serves top up to {_ops.MOST_TOP}, got {top}; impl='chunked' serves any"
        )
    if impl == "fused" or (
        impl == "auto" and top <= _ops.MOST_TOP and _ops.kmeans_serves(x.device, dtype, "kmeans_assign")
    ):
        assignment, distance = _ops.kmeans_assign(x, centroids, cosine=cosine, top=top)
    else:
        check_finite("x", x)
        module = reference if impl == "reference" else chunked
        assignment, distance = module.kmeans_assign(x, centroids, cosine=cosine, top=top)
        distance = narrow(distance, dtype)
    if top == 1:
        assignment, distance = assignment[:, 0], distance[:, 0]
    return Nearest(assignment, distance)


@takes_arrays
@torch.no_grad()
def kmeans_update(
    x: Tensor,
    centroids: Tensor,
    *,
    weights: Tensor | None = None,
    metric: Metric = "euclidean",
    impl: Impl = "auto",
) -> Update:
    """One pass of Lloyd's iteration: assign every point, and sum up the points of each cluster.

    Equals (``x`` after ``normalize`` for the cosine, all in float64)

        assignment, distance = kmeans_assign(x, centroids)
        sums = zeros(K, d).index_add(0, assignment, weights[:, None] * x)
        counts = bincount(assignment, weights, minlength=K)
        inertia = (weights * distance).sum()

    so that the next centroids are ``sums / counts[:, None]``. Deterministic: the same call on as many threads
    gives the same bits.

    Args:
        x: points ``[N, d]``, any floating-point dtype and strides.
        centroids: ``[K, d]``, on the same device.
        weights: of the points, ``[N]``, at least 0; ``None`` for 1 each.
        metric: as in :func:`kmeans_assign`. For ``"cosine"`` the unit vectors are summed (spherical k-means),
            zero vectors among them as zero. Where nothing is float64 the CPU kernels round each number of a
            unit vector, taken in float64, to a multiple of 2⁻⁴⁰ before it is weighed: at most 2⁻⁴¹ is lost,
            where float32 loses up to 2⁻²⁵; without weights the sums of what was rounded are exact, in any
            order and whatever joined and left before.
        impl: as in :func:`kmeans_assign`.

    Returns:
        ``assignment`` and ``distance`` as :func:`kmeans_assign` returns them; ``sums``, float64 ``[K, d]``;
        ``counts``, int64 ``[K]``, or with ``weights`` their sums, float64 ``[K]``; ``inertia``, float64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a value is out of range, a weight is negative, or
            a row of ``x`` or ``centroids`` is not finite.
        RuntimeError: ``impl="fused"`` where the extension was not built or does not serve the device.

    Source: Lloyd, IEEE Trans. Inf. Theory 28, 1982; Dhillon & Modha, Machine Learning 42, 2001 (cosine).
    """
    x, centroids, dtype = check_problem(x, centroids, metric, impl)
    weights = check_weights(weights, x)
    cosine = metric == "cosine"
    if impl == "fused" or (impl == "auto" and _ops.kmeans_serves(x.device, dtype, "kmeans_update")):
        return Update(*_ops.kmeans_update(x, centroids, weights=weights, cosine=cosine))
    check_finite("x", x)
    module = reference if impl == "reference" else chunked
    assignment, distance, *rest = module.kmeans_update(x, centroids, weights=weights, cosine=cosine)
    return Update(assignment, narrow(distance, dtype), *rest)


@takes_arrays
@torch.no_grad()
def kmeans_distances(
    x: Tensor,
    centroids: Tensor,
    assignment: Tensor,
    *,
    weights: Tensor | None = None,
    metric: Metric = "euclidean",
    impl: Impl = "auto",
) -> Distances:
    """The distance of each point from the centroid it is assigned to: one pass over the points.

    Equals, in float64 (after ``normalize``, and halved, for the cosine),

        distance = (x - centroids[assignment]).square().sum(dim=1)
        inertia = (weights * distance).sum()

    Args:
        x: points ``[N, d]``, any floating-point dtype and strides.
        centroids: ``[K, d]``, on the same device.
        assignment: a centroid of each point, int64 ``[N]``.
        weights: of the points, ``[N]``, at least 0; ``None`` for 1 each.
        metric: as in :func:`kmeans_assign`.
        impl: as in :func:`kmeans_assign`; there is no other reference than ``"chunked"``.

    Returns:
        ``distance`` as :func:`kmeans_assign` returns it, and ``inertia``, float64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, a weight is negative, or a row of ``centroids``, or
            one of ``x`` (on the CPU; elsewhere its distance is NaN), is not finite.
        RuntimeError: ``assignment`` names no centroid; ``impl="fused"`` where the extension was not built or
            does not serve the device.
    """
    x, centroids, dtype = check_problem(x, centroids, metric, impl)
    check_vector("assignment", assignment, len(x), x, integer=True, other="x")
    weights = check_weights(weights, x)
    cosine = metric == "cosine"
    if impl == "fused" or (impl == "auto" and _ops.kmeans_serves(x.device, dtype, "kmeans_distances")):
        found = Distances(*_ops.kmeans_distances(x, centroids, assignment, weights=weights, cosine=cosine))
    else:
        check_assignment(assignment, len(centroids))
        distance, inertia = chunked.kmeans_distances(x, centroids, assignment, weights=weights, cosine=cosine)
        found = Distances(narrow(distance, dtype), inertia)
    _check_outcome(x, found.inertia)
    return found


@takes_arrays
@torch.no_grad()
def kmeans_potentials(
    x: Tensor,
    candidates: Tensor,
    nearest: Tensor,
    *,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    impl: Impl = "auto",
) -> Potentials:
    """The potential of k-means++ if each of a few candidates became a centroid: one pass over the points.

    Equals

        distance = torch.minimum(nearest, torch.cdist(candidates, scale[:, None] * x).square())
        potential = distance.double() @ weights

    with every distance taken from the differences, so that data far from the origin keep their digits.
    Deterministic on a given number of threads. Squares are not rescaled: values beyond 1e18 overflow.

    Args:
        x: points ``[N, d]``, any floating-point dtype and strides.
        candidates: ``[m, d]``, float64 where ``x`` is, else float32 or float64.
        nearest: the squared distance of each point from its nearest centroid so far, ``[N]``, infinity before
            the first; of the candidates' dtype.
        scale: of each row of ``x``, ``[N]``, of the candidates' dtype; ``None`` for 1 (cosine: ``1 / ‖x‖``).
        weights: of the points, float64 ``[N]``, at least 0; ``None`` for 1 each.
        impl: as in :func:`kmeans_assign`; there is no other reference than ``"chunked"``.

    Returns:
        ``distance`` ``[m, N]`` of the candidates' dtype, and ``potential``, float64 ``[m]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together; on the CPU also if a weight is negative, a row of
            ``candidates`` is not finite, or one of ``x`` that makes a potential so (one that `nearest` bounds
            may pass unseen).
        RuntimeError: ``impl="fused"`` where the extension was not built or does not serve the device.

    Source: Arthur & Vassilvitskii, *k-means++: The Advantages of Careful Seeding*, SODA 2007 (with
    several candidates a step).
    """
    check_choice("impl", impl, Impl)
    check_matrix("x", x)
    check_matrix("candidates", candidates)
    if candidates.shape[1] != x.shape[1]:
        raise ValueError(
            f"candidates: expected {x.shape[1]} columns as in x, got shape {tuple(candidates.shape)}"
        )
    check_device("candidates", candidates, x, other="x")
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    if candidates.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"candidates: expected {expected} for x in {x.dtype}, got {candidates.dtype}")
    for name, vector, dtype in (
        ("nearest", nearest, candidates.dtype),
        ("scale", scale, candidates.dtype),
        ("weights", weights, torch.float64),
    ):
        if vector is None:
            continue
        check_vector(name, vector, len(x), x, integer=False, other="x")
        if vector.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {vector.dtype}")
    if may_look(x):  # which takes no time here; a look at all of x would take as long as the pass
        check_finite("candidates", candidates)
        check_weights(weights, x)
    served = impl == "auto" and _ops.kmeans_serves(x.device, candidates.dtype, "kmeans_potentials")
    if impl == "fused" or served:
        found = Potentials(*_ops.kmeans_potentials(x, candidates, nearest, scale=scale, weights=weights))
    else:
        found = Potentials(*chunked.kmeans_potentials(x, candidates, nearest, scale=scale, weights=weights))
    _check_outcome(x, found.potential)
    return found


def check_problem(x: Tensor, centroids: Tensor, metric: str, impl: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Points, centroids in the dtype of the computation, and that dtype."""
    check_choice("metric", metric, Metric)
    check_choice("impl", impl, Impl)
    check_matrix("x", x)
    check_matrix("centroids", centroids)
    if centroids.shape[1] != x.shape[1]:
        raise ValueError(
            f"centroids: expected {x.shape[1]} columns as in x, got shape {tuple(centroids.shape)}"
        )
    if len(centroids) == 0:
        raise ValueError("centroids: expected at least one, got none")
    check_device("centroids", centroids, x, other="x")
    dtype = torch.float64 if torch.float64 in (x.dtype, centroids.dtype) else torch.float32
    check_finite("centroids", centroids)
    return x, centroids.to(dtype), dtype


def check_weights(weights: Tensor | None, x: Tensor) -> Tensor | None:
    """The points' weights in float64."""
    if weights is None:
        return None
    check_vector("weights", weights, len(x), x, integer=False, other="x")
    traced = is_fake(weights) or torch.compiler.is_compiling()
    if not traced and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights: expected finite numbers of at least 0")
    return weights.double()


def check_assignment(assignment: Tensor, n_clusters: int) -> None:
    if is_fake(assignment) or torch.compiler.is_compiling():
        return
    bad = assignment[(assignment < 0) | (assignment >= n_clusters)]
    if len(bad):
        raise RuntimeError(f"assignment: expected 0 to {n_clusters - 1}, got {int(bad[0])}")


def check_finite(name: str, rows: Tensor) -> None:
    if is_fake(rows) or torch.compiler.is_compiling():
        return
    # A sum is finite only where every element is; where it is not, an overflow may be to blame.
    if rows.numel() == 0 or bool(rows.sum(dtype=torch.float64).isfinite()):
        return
    bad = ~rows.isfinite().all(dim=1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in row {row}")


def _check_outcome(x: Tensor, sums: Tensor) -> None:
    """Refuse points that are not finite by what came of them: nothing is read twice where all is well."""
    if may_look(sums) and not bool(sums.isfinite().all()):
        check_finite("x", x)


def narrow(distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Distances in a dtype, at most its largest number."""
    return distance.clamp(max=torch.finfo(dtype).max).to(dtype)
