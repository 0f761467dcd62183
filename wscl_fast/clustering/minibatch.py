"""Mini-batch k-means: centroids as running means over batches, for streams and for very large data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wscl_fast.clustering.lloyd import Clustering, Progress, lloyd
from wscl_fast.clustering.points import Points, unit
from wscl_fast.functional import kmeans_update

_PATIENCE = 10  # batches whose smoothed inertia may fail to improve, as in scikit-learn


class RunningMeans:
    """The weighted mean of every sample that a centroid was ever nearest to.

    Source: Sculley, *Web-Scale K-Means Clustering*, WWW 2010: a rate of 1 / count for each centroid.

    Args:
        centroids: where to start [K, d].
        cosine: whether centroids are directions.
    """

    def __init__(self, centroids: Tensor, cosine: bool) -> None:
        self.centroids, self.cosine = centroids, cosine
        self.sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
        self.counts = self.sums.new_zeros(len(centroids))

    def check(self, n_clusters: int, metric: str) -> None:
        """Refuse parameters that were set anew since the first batch.

        Raises:
            ValueError: another `n_clusters` or `metric`.
        """
        own = "cosine" if self.cosine else "euclidean"
        for name, value, began in (("n_clusters", n_clusters, len(self.sums)), ("metric", metric, own)):
            if value != began:
                raise ValueError(f"{name}: expected {began!r} as in the batches before, got {value!r}")

    def rename(self, take: Tensor) -> None:
        """Let the centroids follow in another order, `take` [K]."""
        take = take.to(self.sums.device)
        self.centroids, self.sums, self.counts = self.centroids[take], self.sums[take], self.counts[take]

    def add(self, points: Points) -> tuple[float, float]:
        """Assign a batch and move the centroids; returns its inertia and its weight."""
        sums, counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        inertia = self.counts.new_zeros(1)
        for rows, block in points.blocks():
            weights = None if points.weights is None else points.weights[rows]
            found = kmeans_update(block, self.centroids, weights=weights, metric=points.metric)
            sums += found.sums
            counts += found.counts
            inertia += found.inertia * (2 if self.cosine else 1)
        sums, counts, inertia = (points.ranks.sum(part) for part in (sums, counts, inertia))
        # Not in place: a batch under `torch.inference_mode` may come before one without.
        self.sums = self.sums + sums
        self.counts = self.counts + counts
        seen = self.counts[:, None] > 0
        means = unit(self.sums) if self.cosine else self.sums / self.counts[:, None].where(seen, 1)
        usable = seen & (means != 0).any(dim=1, keepdim=True) if self.cosine else seen
        self.centroids = torch.where(usable, means, self.centroids.double()).to(self.centroids.dtype)
        return float(inertia), float(counts.sum())


def batches(points: Points, size: int, generator: torch.Generator) -> Iterator[Points]:
    """All rows once, in batches of `size` over all ranks: shuffled, within blocks where they are in files."""
    share = max(1, size // points.ranks.size)
    most = int(points.ranks.of_all(torch.tensor(points.n, device=points.device)).max())
    left = -(-most // share)  # every rank gives as many batches, the last ones perhaps empty
    held: list[tuple[Tensor, Tensor | None]] = []  # what makes no whole batch yet
    count = 0
    for rows, block in points.raw():
        order = torch.randperm(len(block), generator=generator).to(points.device)
        while len(order):
            picked, order = order[: share - count], order[share - count :]
            held.append((block[picked], None if points.weights is None else points.weights[rows][picked]))
            count += len(picked)
            if count == share:
                left -= 1
                yield _batch(points, held)
                held, count = [], 0
    if held:
        left -= 1
        yield _batch(points, held)
    nothing = torch.empty(0, points.dim, dtype=points.dtype, device=points.device)
    for _ in range(left):
        yield _batch(points, [(nothing, None if points.weights is None else points.weights[:0])])


def minibatch(
    points: Points,
    centroids: Tensor,
    *,
    batch_size: int,
    max_iter: int,
    tolerance: float,
    empty: str,
    generator: torch.Generator,
    report: Callable[[Tensor, Progress], None] | None = None,
) -> Clustering:
    """Passes over shuffled batches, then one pass that assigns every sample; no sample is left out.

    Stops after `max_iter` passes, when a pass moved the centroids by at most `tolerance`, or when the
    smoothed inertia of the batches has not improved for ten of them.
    """
    means = RunningMeans(centroids, points.metric == "cosine")
    history: list[float] = []
    smooth, best, stale = None, float("inf"), 0
    n_iter, ended = 0, False
    while not ended:
        n_iter += 1
        before, total = means.centroids, 0.0
        for batch in batches(points, batch_size, generator):
            inertia, weight = means.add(batch)
            total, value = total + inertia, inertia / max(weight, 1e-300)
            rate = min(1.0, 2 * batch_size / (points.n_all + 1))
            smooth = value if smooth is None else smooth + rate * (value - smooth)
            best, stale = (smooth, 0) if smooth < best else (best, stale + 1)
        history.append(total)
        movement = float((means.centroids.double() - before.double()).square().sum())
        ended = movement <= tolerance or n_iter >= max_iter or stale >= _PATIENCE
        if report is not None:
            report(means.centroids, Progress(n_iter, history, ended))
    # One update of all samples fills what stayed empty; its last pass assigns.
    lonely = bool((means.counts == 0).any())
    begin = Progress(n_iter, history, ended=not lonely)
    return lloyd(
        points,
        means.centroids,
        max_iter=n_iter + 1,
        tolerance=0.0,
        empty=empty,
        algorithm="lloyd",
        begin=begin,
    )


def _batch(points: Points, held: list[tuple[Tensor, Tensor | None]]) -> Points:
    rows = torch.cat([part for part, _ in held])
    known = [weights for _, weights in held if weights is not None]
    weights = torch.cat(known) if known else None
    return Points(rows, weights=weights, metric=points.metric, ranks=points.ranks, frame=points.frame)
