"""What becomes of a cluster that lost its samples."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from wscl_fast.clustering.bounds import distances
from wscl_fast.clustering.points import Points

EMPTY = ("farthest", "split", "keep")

_STEP = 2.0**-7  # how far the halves of a split cluster stand apart, of the way to its farthest sample


def fill_empty(
    points: Points,
    assignment: Tensor,
    distance: Tensor,
    sums: Tensor,
    counts: Tensor,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Move the samples farthest from their centroids into the empty clusters, as scikit-learn does.

    The only sample of a cluster stays in it, so with few distinct samples clusters may stay empty.

    `sums` are those of the clusters from `first` on, all or a shard of them; `counts` those of all.

    Returns:
        The sums and the weights of the clusters afterwards, float64.
    """
    empty = (counts == 0).nonzero()[:, 0].tolist()
    square = distance.double()
    weights = points.weights
    if weights is not None:
        square = square.where(weights > 0, -1)
    # Twice as many candidates as needed, since the only sample of a cluster must stay in it.
    far = _farthest(square, min(2 * len(empty), points.n))
    weight = torch.ones_like(square[far]) if weights is None else weights[far]
    number = (far + points.first_row).double()  # exact to 2^53
    offered = torch.stack([square[far], number, assignment[far].double(), weight], dim=1)
    offered = points.ranks.gather(offered)
    # Farthest first; of equally far ones the first, however the rows are cut into shards.
    offered = offered[offered[:, 1].argsort()]
    offered = offered[offered[:, 0].argsort(descending=True, stable=True)][: 2 * len(empty)]
    sums, counts = sums.clone(), counts.clone()
    members = counts.clone()
    if weights is not None:  # whose sums, less what left, need not come out as the weight of those that stay
        members = points.ranks.sum(torch.bincount(assignment, (weights > 0).double(), minlength=len(counts)))
    for some in torch.split(offered, points.rows_at_once()):
        if not empty:
            break
        rows = points.directions(points.rows_of_all(some[:, 1].long())).double()
        for row, (apart, _, cluster, w) in zip(rows, some.tolist(), strict=True):
            donor = int(cluster)
            if not empty:
                break
            if apart < 0 or members[donor] <= 1:
                continue
            target = empty.pop(0)
            if 0 <= donor - first < len(sums):
                sums[donor - first] -= w * row
            if 0 <= target - first < len(sums):
                sums[target - first] = w * row
            counts[donor] -= w
            counts[target] = w
            members[donor] -= 1
    return sums, counts


def _farthest(square: Tensor, count: int) -> Tensor:
    """Rows of the largest distances, int64 [count]; of equal ones the first, where `topk` takes any."""
    if not count:
        return square.new_empty(0, dtype=torch.int64)
    least = square.topk(count).values[-1]
    beyond = (square > least).nonzero()[:, 0]
    return torch.cat([beyond, (square == least).nonzero()[: count - len(beyond), 0]])


def split_largest(points: Points, centroids: Tensor, assignment: Tensor, counts: Tensor) -> Tensor:
    """Give each empty cluster half of the heaviest one: both halves end up beside its centroid.

    The plane between them goes through the centroid, across the direction of its farthest sample.
    """
    heap = [(-weight, k) for k, weight in enumerate(counts.tolist()) if weight > 0]
    heapq.heapify(heap)
    halves: list[tuple[int, int]] = []
    for target in (counts == 0).nonzero()[:, 0].tolist():
        weight, donor = heapq.heappop(heap)
        halves.append((donor, target))
        heapq.heappush(heap, (weight / 2, donor))
        heapq.heappush(heap, (weight / 2, target))
    square = distances(points, centroids, assignment)
    moved = centroids.clone()
    for donor, target in halves:
        own = square.where(assignment == donor, -1)
        far = own.argmax() if points.n else own.new_zeros((), dtype=torch.int64)
        best = own[far] if points.n else own.new_full((), -1)
        offered = points.ranks.of_all(torch.stack([best, (far + points.first_row).double()]))
        number = offered[offered[:, 0].argmax(), 1].long()
        step = _STEP * (points.directions(points.rows_of_all(number[None]))[0] - centroids[donor])
        moved[target] = moved[donor] + step
        moved[donor] = moved[donor] - step
    return points.directions(moved)
