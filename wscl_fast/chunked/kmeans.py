"""K-means in plain PyTorch, block by block: exact assignments in memory linear in N + K.

The mathematics of the fused kernels. A block of points meets all centroids in one matrix product that says
how near each is, up to a rounding error whose bound is known; where more centroids than asked for lie within
twice that bound of the nearest, those few distances are taken again from the differences, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.scatter import add_rows

# Elements of the widest temporary: about what a CPU's cache holds; enough rows to fill a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


class Table(NamedTuple):
    """The centroids as the matrix product sees them: `score = (x − origin) · scale @ columns.T − offset`.

    The nearest centroid has the highest score. Seen from the middle of the centroids, and scaled by a power
    of two, the product keeps its digits far from zero and cannot overflow.
    """

    origin: Tensor  # [d]
    scale: float
    columns: Tensor  # [K, d], largest element in [½, 1)
    offset: Tensor  # [K]
    largest: Tensor  # 0-dim, the longest column
    exact: Tensor  # [K, d] float64: what distances are taken to


def unit(x: Tensor) -> Tensor:
    """Rows in float64 and of length 1, whatever their scale; zero stays zero."""
    x = x.double()
    largest = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    x = x / torch.where(largest == 0, 1.0, largest)
    norm = x.square().sum(dim=1, keepdim=True).sqrt()
    return x / torch.where(norm == 0, 1.0, norm)


def difference(x: Tensor, centroids: Tensor, cosine: bool) -> Tensor:
    """Distance of each row from the centroid beside it; both float64, unit vectors where cosine."""
    squared = (x - centroids).square().sum(dim=1)
    if not cosine:
        return squared
    undirected = (x == 0).all(dim=1) | (centroids == 0).all(dim=1)
    return torch.where(undirected, 1.0, squared / 2)


def kmeans_assign(x: Tensor, centroids: Tensor, *, cosine: bool, top: int) -> tuple[Tensor, Tensor]:
    """The `top` nearest centroids of each point, int64 [N, top], and their distances, float64 [N, top].

    Centroids are float32 or float64, the dtype of the computation; x may be of any lesser one.
    """
    table = _table(centroids, cosine)
    assignment = torch.empty(len(x), top, dtype=torch.int64, device=x.device)
    distance = torch.empty(len(x), top, dtype=torch.float64, device=x.device)
    for rows in _blocks(x, width=max(centroids.shape)):
        assignment[rows], distance[rows] = _nearest(x[rows], table, cosine, top)
    return assignment, distance


def kmeans_update(
    x: Tensor, centroids: Tensor, *, weights: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Nearest centroid and distance of each point, and the sums, counts and inertia of the clusters."""
    table = _table(centroids, cosine)
    n, k = len(x), len(centroids)
    assignment = torch.empty(n, dtype=torch.int64, device=x.device)
    distance = torch.empty(n, dtype=torch.float64, device=x.device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=x.device)
    inertia = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in _blocks(x, width=max(centroids.shape)):
        nearest, near = _nearest(x[rows], table, cosine, 1)
        assignment[rows], distance[rows] = nearest[:, 0], near[:, 0]
        points = unit(x[rows]) if cosine else x[rows].double()
        near = near[:, 0]
        if weights is not None:
            share = weights[rows].double()
            points, near = points * share[:, None], near * share
        inertia += near.sum()
        add_rows(sums, nearest[:, 0], points)
    return assignment, distance, sums, cluster_counts(assignment, weights, k), inertia


def cluster_counts(assignment: Tensor, weights: Tensor | None, n_clusters: int) -> Tensor:
    """Points of each cluster, int64 [K], or their weights, float64 [K]."""
    if weights is None:
        return torch.bincount(assignment, minlength=n_clusters)
    # On the CPU in the order of the points; on a GPU bincount would add atomically, in any order.
    if not weights.is_cuda:
        # Of no points bincount makes integers whatever the weights.
        return torch.bincount(assignment, weights.double(), minlength=n_clusters).double()
    counts = torch.zeros(n_clusters, dtype=torch.float64, device=weights.device)
    return counts.index_put_((assignment,), weights.double(), accumulate=True)


def kmeans_distances(
    x: Tensor, centroids: Tensor, assignment: Tensor, *, weights: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor]:
    """The distance of each point from its own centroid, float64 [N], and the inertia."""
    exact = unit(centroids) if cosine else centroids.double()
    distance = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows in _blocks(x, width=x.shape[1]):
        points = unit(x[rows]) if cosine else x[rows].double()
        distance[rows] = difference(points, exact[assignment[rows]], cosine)
    return distance, distance.sum() if weights is None else distance @ weights.double()


def kmeans_potentials(
    x: Tensor, candidates: Tensor, nearest: Tensor, *, scale: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The squared distance of each point from the nearer of each candidate and what was nearest so far."""
    distance = nearest.new_empty(len(candidates), len(x))
    potential = torch.zeros(len(candidates), dtype=torch.float64, device=x.device)
    for rows in _blocks(x, width=x.shape[1] * len(candidates)):
        points = x[rows].to(candidates.dtype)
        if scale is not None:
            points = points * scale[rows, None]
        square = (points - candidates[:, None]).square_().sum(dim=2)  # from the differences: nothing cancels
        distance[:, rows] = torch.minimum(square, nearest[rows])
        near = distance[:, rows].double()
        potential += near.sum(dim=1) if weights is None else near @ weights[rows]
    return distance, potential


def _table(centroids: Tensor, cosine: bool) -> Table:
    exact = unit(centroids) if cosine else centroids.double()
    origin = (exact / len(exact)).sum(dim=0).to(centroids.dtype)
    centred = exact - origin.double()
    # A power of two: scaling loses nothing.
    exponent = int(torch.frexp(centred.abs().max()).exponent) if centred.numel() else 0
    scale = 2.0 ** -max(min(exponent, 900), -900)
    columns = (centred * scale).to(centroids.dtype)
    kept = columns.double()
    # In the cosine only the product counts, whatever a centroid's length: zero has no direction.
    offset = -(kept @ (origin.double() * scale)) if cosine else kept.square().sum(dim=1) / 2
    largest = kept.square().sum(dim=1).max().sqrt()
    return Table(origin, scale, columns, offset.to(centroids.dtype), largest, exact)


def _unit_roundoff(dtype: torch.dtype) -> float:
    """Of a product of this dtype: where reduced precision is allowed, bfloat16's."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-8
    return torch.finfo(dtype).eps / 2


def _nearest(x: Tensor, table: Table, cosine: bool, top: int) -> tuple[Tensor, Tensor]:
    points = unit(x) if cosine else x.double()
    dtype = table.columns.dtype
    centred = ((points - table.origin) * table.scale).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        score = torch.addmm(table.offset, centred, table.columns.T, beta=-1)  # [n, K]
    # |score − its true value| ≤ bound: the product's rounding error, the operands' and the offset's.
    length = centred.double().square().sum(dim=1).sqrt()
    offset = table.offset.abs().max().double()
    bound = _unit_roundoff(dtype) * (x.shape[1] + 8) * (length * table.largest + offset)
    bound += torch.finfo(dtype).tiny * (x.shape[1] + 8)
    if cosine:  # a rounded column meets the unit vector, which is longer than its shifted self
        bound += 4 * _unit_roundoff(dtype) * table.largest * table.scale
    least = score.max(dim=1).values if top == 1 else score.topk(top, dim=1).values[:, -1]
    # Also true where an overflow left a NaN: then every centroid is looked at again.
    close = ~(score.double() < (least.double() - 2 * bound)[:, None])
    undecided = close.sum(dim=1) > 1 if top == 1 else torch.ones_like(least, dtype=torch.bool)

    assignment = score.argmax(dim=1, keepdim=True).expand(-1, top).contiguous()
    rows, columns = (close & undecided[:, None]).nonzero(as_tuple=True)
    distance = points.new_empty(len(rows))
    for pairs in _blocks(distance, width=x.shape[1], device=x.device):
        distance[pairs] = difference(points[rows[pairs]], table.exact[columns[pairs]], cosine)
    order = distance.argsort(stable=True)  # of equals, the lower index stays first
    order = order[rows[order].argsort(stable=True)]
    rows, columns, distance = rows[order], columns[order], distance[order]
    first = torch.searchsorted(rows, torch.arange(len(x), device=x.device))
    place = torch.arange(len(rows), device=x.device) - first[rows]
    kept = place < top
    assignment[rows[kept], place[kept]] = columns[kept]
    nearest = [difference(points, table.exact[column], cosine) for column in assignment.unbind(1)]
    return assignment, torch.stack(nearest, dim=1)


def _blocks(x: Tensor, width: int, device: torch.device | None = None) -> Iterator[slice]:
    elements = BLOCK_ELEMENTS.get((device or x.device).type, BLOCK_ELEMENTS["cpu"])
    rows = max(64, elements // max(1, width))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)
