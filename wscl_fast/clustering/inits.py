"""Where k-means starts: k-means++, its scalable kin k-means||, or samples drawn at random.

All draws come from one CPU generator, which every rank seeds alike, and name samples by their number among
all ranks' rows: shards give the start that one process on the union of them finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wscl_fast.clustering.arrays import as_samples
from wscl_fast.clustering.points import Points, unit
from wscl_fast.clustering.shards import Shards, nearest_of_shards
from wscl_fast.functional.kmeans import kmeans_assign, kmeans_potentials

INITS = ("k-means++", "k-means||", "random")
_ROUNDS = 5  # of k-means||: Bahmani et al. find 5 enough
_OVERSAMPLING = 1.0  # candidates drawn in each round, in units of K
_MOST_ONE_BY_ONE = 4096  # of k-means++ over the candidates: beyond, K² d would cost more than the data


def choose_start(
    points: Points, n_clusters: int, init: str, generator: torch.Generator, *, in_shards: bool = False
) -> Tensor:
    """Centroids to start from, on every rank, as `points.blocks` sees samples [n_clusters, d].

    With `in_shards` those of this rank's shard alone; no rank holds all of them at any time. Of fewer samples
    of weight above 0 than clusters all are chosen, and some of no weight, or some again.

    Raises:
        ValueError: no such `init`.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {INITS} or an array of centroids, got {init!r}")
    if init == "random":
        chosen = draw_without_replacement(points, n_clusters, generator)
    elif init == "k-means++":
        chosen = plus_plus(points, n_clusters, generator)
    else:
        return scalable(points, n_clusters, generator, in_shards)
    return _rows(points, _with_direction(points, chosen), in_shards)


def _with_direction(points: Points, chosen: Tensor) -> Tensor:
    """Numbers of samples [K], but that zero vectors give way to others when cosine: they are no centroids.

    Where few samples differ or have a weight, the rest of a start is any of them. K or more have a direction.
    """
    if points.metric != "cosine" or points.weights is None:  # `settle` has given zero vectors the weight 0
        return chosen
    if bool(points.ranks.gather(points.weights)[chosen].gt(0).all()):
        return chosen
    mine = torch.zeros(points.n, dtype=torch.uint8, device=points.device)
    for rows, block in points.parts():
        mine[rows] = block.any(dim=1).to(mine)
    directed = points.ranks.gather(mine).bool()
    lost = ~directed[chosen]
    if bool(lost.any()):
        chosen = chosen.clone()
        directed[chosen] = False
        chosen[lost] = directed.nonzero()[: int(lost.sum()), 0]
    return chosen


def given_start(
    points: Points, n_clusters: int, array: Any, name: str, shards: Shards | None = None
) -> Tensor:
    """The centroids that a user gave as `name`, as `points.blocks` sees samples, or this rank's shard.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    start = as_samples(array, name).x
    if start.shape != (n_clusters, points.dim):
        raise ValueError(f"{name}: expected centroids [{n_clusters}, {points.dim}], got {list(start.shape)}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    cosine = points.metric == "cosine"
    if cosine and not bool((start != 0).any(dim=1).all()):
        raise ValueError(f"{name}: expected centroids with a direction (cosine), got a zero vector")
    own = start if shards is None else start[shards.own]
    own = own.to(points.device, torch.float64)
    return (unit(own) if cosine else points.frame.see(own)).to(points.dtype)


def _rows(points: Points, numbers: Tensor, in_shards: bool) -> Tensor:
    """Samples by their number among all ranks', or this rank's shard of them."""
    if in_shards:
        return Shards(len(numbers), points.ranks).rows(points, numbers)
    return points.directions(points.rows_of_all(numbers))


def draw_without_replacement(points: Points, count: int, generator: torch.Generator) -> Tensor:
    """Numbers of `count` different samples, with probabilities by weight, int64 [count].

    Equals `torch.multinomial(weights, count)`: the largest log w + Gumbel noise (Efraimidis & Spirakis 2006).
    """
    noise = torch.rand(points.n_all, dtype=torch.float64, generator=generator).to(points.device)
    if points.weights is None:
        return noise.topk(count).indices
    weights = points.ranks.gather(points.weights)
    return (weights.log() - (-noise.log()).log()).topk(count).indices


def plus_plus(points: Points, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Numbers of the samples that k-means++ chooses, int64 [n_clusters].

    Each next sample is drawn with probability proportional to its weight times its squared distance from
    those chosen; of `2 + ⌊log K⌋` such draws the one that lowers the sum of squared distances most is kept,
    as in scikit-learn. One block of rows is in the cache at a time; distances are never negative.

    Source: Arthur & Vassilvitskii, *k-means++: The Advantages of Careful Seeding*, SODA 2007.
    """
    trials = 2 + int(math.log(n_clusters))
    field = _Field.of(points)
    chosen = torch.empty(n_clusters, dtype=torch.int64, device=points.device)
    chosen[0] = field.draw(1, generator)[0]
    field.take(chosen[:1])
    for i in range(1, n_clusters):
        chosen[i] = field.take(field.draw(trials, generator))
    return chosen


def scalable(points: Points, n_clusters: int, generator: torch.Generator, in_shards: bool = False) -> Tensor:
    """Centroids by k-means||: a few rounds that each draw K samples at once, then k-means++ of the draws.

    Memory beyond the data is the candidates, about 5 K rows, and three numbers a sample. With `in_shards`
    each rank has its share of the candidates, and of the centroids.

    Source: Bahmani et al., *Scalable K-Means++*, VLDB 2012, algorithm 2.
    """
    field = _Field.of(points, in_shards)
    taken = field.draw(1, generator)
    rows = [field.approach(taken)]
    for _ in range(_ROUNDS):
        drawn = field.draw_each(_OVERSAMPLING * n_clusters, generator)
        if not len(drawn):
            break
        rows.append(field.approach(drawn, first=len(taken)))
        taken = torch.cat([taken, drawn])
    if len(taken) < n_clusters:  # few distinct samples: any others will do
        others = torch.ones(points.n_all, dtype=torch.bool, device=points.device)
        others[taken] = False
        taken = torch.cat([taken, others.nonzero()[: n_clusters - len(taken), 0]])
        return _rows(points, _with_direction(points, taken), in_shards)
    weights = points.ranks.sum(field.weight_of_candidates(len(taken)))
    if in_shards:  # cut anew: shares of each round together are no shares of all
        candidates = _rows(points, taken, in_shards)
        own = Shards(len(taken), points.ranks).own
        few = Points(candidates, weights=weights[own], ranks=points.ranks)
    else:
        candidates = torch.cat(rows)
        few = Points(candidates, weights=weights)
    if len(taken) == n_clusters:
        return candidates
    if n_clusters > _MOST_ONE_BY_ONE:
        chosen = _by_rounds(few, n_clusters, generator, in_shards)
    else:
        chosen = plus_plus(few, n_clusters, generator)
    return _rows(few, chosen, in_shards)


def _by_rounds(
    points: Points, n_clusters: int, generator: torch.Generator, in_shards: bool = False
) -> Tensor:
    """k-means++ without trials, an eighth of what is chosen at a time; distances are renewed in between.

    A draw of a round sees the distances that held when the round began, so the rounds are short at first.
    """
    field = _Field.of(points, in_shards)
    chosen = field.draw(1, generator)
    field.approach(chosen)
    while len(chosen) < n_clusters:
        count = min(max(1, len(chosen) // 8), n_clusters - len(chosen))
        weight = points.ranks.gather(field.potential())
        weight[chosen] = 0
        if int((weight > 0).sum()) < count:
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        noise = torch.rand(points.n_all, dtype=torch.float64, generator=generator).to(points.device)
        drawn = (weight.log() - (-noise.log()).log()).topk(count).indices
        chosen = torch.cat([chosen, drawn])
        field.approach(drawn)
    return chosen


@dataclass
class _Field:
    """The squared distance of each sample of this rank from the nearest that was chosen."""

    points: Points
    nearest: Tensor  # [n], infinity before the first
    owner: Tensor  # int64 [n], which candidate is the nearest
    scale: Tensor | None  # [n], what scales a row to length 1 when cosine
    in_shards: bool  # whether samples that are chosen many at once are cut among the ranks

    @classmethod
    def of(cls, points: Points, in_shards: bool = False) -> _Field:
        scale = None
        if points.metric == "cosine":
            scale = torch.empty(points.n, dtype=points.dtype, device=points.device)
            for rows, block in points.parts():
                length = block.norm(dim=1)
                scale[rows] = (1 / length).where(length > 0, 0)
        nearest = torch.full((points.n,), math.inf, dtype=points.dtype, device=points.device)
        owner = torch.zeros(points.n, dtype=torch.int64, device=points.device)
        return cls(points, nearest, owner, scale, in_shards)

    def potential(self) -> Tensor:
        """Weight times squared distance of each sample, float64 [n]; the weight alone before the first."""
        started = self.points.n > 0 and bool(torch.isfinite(self.nearest[0]))
        square = self.nearest.double() if started else torch.ones_like(self.nearest, dtype=torch.float64)
        return square if self.points.weights is None else square * self.points.weights

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers of `count` samples, each drawn with probability proportional to the potential."""
        cumulative = self.potential().cumsum(dim=0)
        own = cumulative[-1:] if self.points.n else cumulative.new_zeros(1)
        totals = self.points.ranks.of_all(own)[:, 0]
        edges = totals.cumsum(dim=0)
        if not float(edges[-1]) > 0:  # all samples are chosen ones: any will do
            return torch.randint(self.points.n_all, (count,), generator=generator).to(self.points.device)
        draws = torch.rand(count, dtype=torch.float64, generator=generator).to(edges.device) * edges[-1]
        before = edges[self.points.ranks.rank] - own
        local = torch.searchsorted(cumulative, draws - before, right=True)
        mine = (draws >= before) & (local < self.points.n) & (draws < before + own)
        found = torch.where(mine, local + self.points.first_row, -1)
        found = self.points.ranks.of_all(found).amax(dim=0)
        return found.where(found >= 0, self.points.n_all - 1)  # a draw at the very end of all

    def draw_each(self, expected: float, generator: torch.Generator) -> Tensor:
        """Numbers of samples drawn each on its own, `expected` of them on average."""
        potential = self.potential()
        total = float(self.points.ranks.sum(potential.sum()))
        chance = torch.rand(self.points.n_all, generator=generator)  # the same numbers on every rank
        mine = chance[self.points.first_row : self.points.first_row + self.points.n].to(potential.device)
        if not total > 0:
            return torch.empty(0, dtype=torch.int64, device=potential.device)
        local = (mine.double() * total < expected * potential).nonzero()[:, 0]
        return self.points.ranks.gather(local + self.points.first_row)

    def take(self, candidates: Tensor) -> Tensor:
        """Choose the candidate that lowers the sum of squared distances most; returns its number."""
        points = self.points
        rows = points.directions(points.rows_of_all(candidates))  # [trials, d]
        distance = torch.empty(len(candidates), points.n, dtype=points.dtype, device=rows.device)
        sums = torch.zeros(len(candidates), dtype=torch.float64, device=rows.device)
        for part, block in points.blocks():
            found = kmeans_potentials(
                block,
                rows,
                self.nearest[part],
                scale=None if self.scale is None else self.scale[part],
                weights=None if points.weights is None else points.weights[part],
            )
            if len(block) == points.n:
                distance = found.distance
            else:
                distance[:, part] = found.distance
            sums += found.potential
        best = int(points.ranks.sum(sums).argmin())
        self.nearest.copy_(distance[best])
        self._forget(candidates[best : best + 1])
        return candidates[best]

    def approach(self, numbers: Tensor, first: int = 0) -> Tensor:
        """Let the samples of these numbers be chosen, as candidates `first` on; returns their `_rows`."""
        points = self.points
        rows = _rows(points, numbers, self.in_shards)
        if self.in_shards:
            owner, square = nearest_of_shards(points, rows, Shards(len(numbers), points.ranks))
            self._come_closer(slice(None), owner + first, square.to(self.nearest))
            return rows
        for part, block in points.blocks():
            owner, least = kmeans_assign(block, rows, metric=points.metric)
            if points.metric == "cosine":  # 1 − cos is half the squared distance of the directions
                least = 2 * least
            self._come_closer(part, owner + first, least)
        return rows

    def _come_closer(self, part: slice, owner: Tensor, square: Tensor) -> None:
        closer = square < self.nearest[part]
        self.nearest[part] = square.where(closer, self.nearest[part])
        self.owner[part] = owner.where(closer, self.owner[part])

    def weight_of_candidates(self, count: int) -> Tensor:
        """The weight of the samples that each candidate is the nearest of, float64 [count]."""
        return torch.bincount(self.owner, weights=self.points.weights, minlength=count).double()

    def _forget(self, chosen: Tensor) -> None:
        local = chosen - self.points.first_row
        self.nearest[local[(local >= 0) & (local < self.points.n)]] = 0
