"""What becomes of a cluster that lost its samples."""

from __future__ import annotations

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
    """Give empty clusters half of the heaviest ones: both halves end up beside the centroid.

    The plane between them goes through the centroid, across the direction of its farthest sample. The
    heaviest come first, but for those whose samples are all alike, down to half of the heaviest: its halves
    may be next once a pass has told what is in them. What is still empty stays where it was until then.
    """
    most, farthest = _farthest_of_each(points, distances(points, centroids, assignment), assignment, counts)
    weights, donors = counts.where(most > 0, 0).sort(descending=True, stable=True)
    donors = donors[2 * weights > weights[0]]
    targets = (counts == 0).nonzero()[: len(donors), 0]
    donors = donors[: len(targets)]
    step = _STEP * (points.directions(points.rows_of_all(farthest[donors])) - centroids[donors])
    moved = centroids.clone()
    moved[targets] = centroids[donors] + step
    moved[donors] -= step
    return points.directions(moved)


def _farthest_of_each(
    points: Points, square: Tensor, assignment: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest distance in each cluster [K], and the first row of all ranks' that has it, int64 [K]."""
    if points.weights is not None:
        square = square.where(points.weights > 0, -1)
    most = square.new_full(counts.shape, -1).scatter_reduce(0, assignment, square, "amax")
    most = -points.ranks.least(-most)
    there = (square == most[assignment]).nonzero()[:, 0]
    first = torch.full(counts.shape, points.n_all, device=points.device)
    first.scatter_reduce_(0, assignment[there], there + points.first_row, "amin")
    return most, points.ranks.least(first)
