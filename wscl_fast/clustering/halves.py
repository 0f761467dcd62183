"""Many groups of samples split in two at once: what one level of bisecting k-means asks of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.points import Points, unit
from wscl_fast.functional import kmeans_distances
from wscl_fast.functional.kmeans_bounds import add_to_sums
from wscl_fast.scatter import add_rows

_TRIALS = 2  # second centers that are tried: 2 + ⌊log K⌋ for K = 2, as k-means++ has it


class Halves(NamedTuple):
    """What became of m groups; everything of all ranks but the rows."""

    split: Tensor  # bool [m], whether the group fell in two
    centers: Tensor  # [m, 2, d]
    weights: Tensor  # float64 [m, 2], of the samples
    inertias: Tensor  # float64 [m, 2]
    right: Tensor  # bool [n], the half of each row of a group


def halve(
    points: Points, group: Tensor, tolerance: Tensor, *, max_iter: int, generator: torch.Generator
) -> Halves:
    """2-means of every group, in passes over all of them together.

    Equals `KMeans(2, init="k-means++", max_iter=max_iter).fit(x[group == g])` for each group g, up to the
    draws. A row meets the two centers of its own group alone, so that a pass takes n · d steps, however many
    groups there are; groups in which nothing moves any more drop out of it.

    Args:
        points: the samples.
        group: int64 [n], the group of each row, 0 … m − 1, or −1.
        tolerance: float64 [m]: a group is done when its centers move by no more (squared).
        max_iter: most updates of the centers.
        generator: draws the starts, alike on every rank.
    """
    return _Groups(points, group, len(tolerance)).halve(tolerance, max_iter, generator)


def nearer_is_right(points: Points, rows: Tensor, centers: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row is nearer to `centers[left + 1]` than to `centers[left]`, and its squared distance."""
    far = [
        kmeans_distances(rows, centers, index, metric=points.metric).distance for index in (left, left + 1)
    ]
    right = far[1] < far[0]
    return right, far[1].where(right, far[0]).double() * (2 if points.metric == "cosine" else 1)


def rows_for(points: Points, n_centers: int) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows: short, but long enough that preparing so many centers for each is not what it costs."""
    step = max(points.rows_at_once(), n_centers)
    for rows, block in points.blocks():
        for start in range(0, len(block), step):
            part = block[start : start + step]
            yield slice(rows.start + start, rows.start + start + len(part)), part


class _Groups:
    def __init__(self, points: Points, group: Tensor, count: int) -> None:
        self.points, self.group, self.count = points, group, count
        ones = torch.ones_like(group, dtype=torch.float64)
        self.weights = ones if points.weights is None else points.weights

    def halve(self, tolerance: Tensor, max_iter: int, generator: torch.Generator) -> Halves:
        m = self.count
        centers, going = self._start(generator)
        whole = going.clone()
        right = torch.zeros_like(self.group, dtype=torch.bool)
        for number in range(max_iter):
            if not bool(going.any()):
                break
            sums, totals = self._update(centers, going, right)
            weights, changed = totals[: 2 * m], totals[2 * m :]
            if number:
                going = going & (changed > 0)
            moved = self._means(sums, weights, centers)
            moved = moved.where(going.repeat_interleave(2)[:, None], centers)
            movement = (moved.double() - centers.double()).square().sum(dim=1).view(m, 2).sum(dim=1)
            centers = moved
            going = going & (movement > tolerance)
        return self._ended(centers, whole, right)

    def _start(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two centers a group, by k-means++ [2 m, d], and which groups have two samples that differ."""
        points, m = self.points, self.count
        first, found = self._draw(self.weights, generator)
        near = torch.zeros(points.n, dtype=points.dtype, device=points.device)
        for rows, block, own in self._rows(found):
            near[rows] = kmeans_distances(block, first, own, metric=points.metric).distance.to(near)
        chance = near.double() * self.weights
        seconds, potentials = [], torch.zeros(_TRIALS, m, dtype=torch.float64, device=points.device)
        for _ in range(_TRIALS):
            second, differs = self._draw(chance, generator)
            seconds.append(second)
        going = found & differs
        for rows, block, own in self._rows(going):
            for second, potential in zip(seconds, potentials, strict=True):
                square = kmeans_distances(block, second, own, metric=points.metric).distance
                left = torch.minimum(square.to(near), near[rows]).double() * self.weights[rows]
                add_rows(potential, own, left)
        best = points.ranks.sum(potentials).argmin(dim=0)
        second = torch.stack(seconds)[best, torch.arange(m, device=points.device)]
        return torch.stack([first, second], dim=1).reshape(2 * m, -1), going

    def _draw(self, chance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row of each group with probability proportional to its `chance` [m, d], and whether it has any.

        The largest log p + Gumbel noise; every rank draws the noise of all ranks' rows.
        """
        points, m = self.points, self.count
        first = points.first_row
        noise = torch.rand(points.n_all, dtype=torch.float64, generator=generator)
        noise = noise[first : first + points.n].to(points.device)
        mine = ((self.group >= 0) & (chance > 0)).nonzero()[:, 0]
        own = self.group[mine]
        key = chance[mine].log() - (-noise[mine].log()).log()
        best = key.new_full((m,), -math.inf).scatter_reduce_(0, own, key, "amax")
        best = -points.ranks.least(-best)
        won = key == best[own]
        number = torch.full((m,), points.n_all, device=points.device)
        number.scatter_reduce_(0, own[won], mine[won] + first, "amin")
        number = points.ranks.least(number)
        found = number < points.n_all
        rows = points.directions(points.rows_of_all(number.where(found, 0)))
        return rows, found

    def _update(self, centers: Tensor, going: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Assign rows anew; the halves' sums [2 m, d], and their weights with the changes [3 m], float64."""
        points, m = self.points, self.count
        sums = torch.zeros(centers.shape, dtype=torch.float64, device=points.device)
        totals = sums.new_zeros(3 * m)
        for rows, block, own in self._rows(going):
            side, _ = nearer_is_right(points, block, centers, 2 * own)
            weights = self.weights[rows]
            half = 2 * own + side
            add_rows(totals, half, weights)
            add_rows(totals, 2 * m + own, (side != right[rows]).double())
            right[rows] = side
            for part in torch.split(torch.arange(len(block), device=points.device), points.rows_at_once()):
                share = None if points.weights is None else weights[part]
                add_to_sums(sums, block[part], half[part], weights=share, metric=points.metric)
        return points.ranks.sum(sums), points.ranks.sum(totals)

    def _means(self, sums: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
        usable = weights > 0
        means = sums / weights.where(usable, 1)[:, None]
        if self.points.metric == "cosine":  # directions that cancel have no mean
            usable = usable & (means.norm(dim=1) > torch.finfo(torch.float64).eps)
            means = unit(sums)
        return means.to(centers).where(usable[:, None], centers)

    def _ended(self, centers: Tensor, whole: Tensor, right: Tensor) -> Halves:
        """The rows under the last centers."""
        points, m = self.points, self.count
        totals = torch.zeros(2, 2 * m, dtype=torch.float64, device=points.device)
        for rows, block, own in self._rows(whole):
            right[rows], square = nearer_is_right(points, block, centers, 2 * own)
            half, weights = 2 * own + right[rows], self.weights[rows]
            add_rows(totals[0], half, weights)
            add_rows(totals[1], half, weights * square)
        weights, inertias = points.ranks.sum(totals).view(2, m, 2)
        return Halves((weights > 0).all(dim=1), centers.view(m, 2, -1), weights, inertias, right)

    def _rows(self, going: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rows of some groups, part by part: their numbers, themselves and their groups."""
        for rows, block in rows_for(self.points, 2 * self.count):
            own = self.group[rows]
            mine = ((own >= 0) & going[own]).nonzero()[:, 0]
            if len(mine) == len(block):
                yield mine + rows.start, block, own
            elif len(mine):
                yield mine + rows.start, block[mine], own[mine]
