"""Balanced k-means: no cluster larger than a cap, and the prices that make the caps cheap to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wscl_fast.arrays import as_tensor
from wscl_fast.clustering.base import check_count, check_enough, check_least
from wscl_fast.clustering.bounds import cluster_sums, distances, squared
from wscl_fast.clustering.centroid_model import Array
from wscl_fast.clustering.kmeans import KMeans
from wscl_fast.clustering.lloyd import Clustering, is_better, next_centroids
from wscl_fast.clustering.points import Points
from wscl_fast.clustering.search import Step
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional import kmeans_assign
from wscl_fast.functional._checks import check_positive

if TYPE_CHECKING:
    from typing_extensions import Self


_BARELY = 1 - 2.0**-50  # 1.1 · 100 / 10 is a little more than 11 in float64


class BalancedKMeans(KMeans):
    """K-means whose clusters hold at most `⌈cap · n / K⌉` samples, always.

    Each pass raises the price g of clusters that too many samples want, by the log-domain Sinkhorn iteration
    for optimal transport under caps,

        P_ik = softmax_k((g_k − ‖x_i − c_k‖²) / ε),   g_k ← min(0, g_k − ε log(Σ_i P_ik / cap_k)),

    and then assigns each sample to the cheapest cluster that has room, cheapest pairs first; the result is
    stable: no sample and cluster would both rather have each other. No n × K matrix is kept. `predict` takes
    the nearest centroid and knows no caps.

    Sources: Cuturi, *Sinkhorn Distances*, NeurIPS 2013; Caron et al., SwAV, NeurIPS 2020 (Sinkhorn over
    clusters); Gale & Shapley 1962 (the rounding).

    Args:
        n_clusters: K.
        cap: largest size of a cluster, in units of the mean size; at least 1, which makes all alike.
        temperature: ε in units of the mean squared distance to the nearest centroid.
        sinkhorn_iter: price updates in each pass.
        metric, init, n_init, max_iter, tol, sharded, group, random_state, verbose: as of :class:`KMeans`.

    Attributes:
        prices_: g of the last pass, float64 [K], at most 0.
        labels_, cluster_centers_, inertia_, counts_, …: as of :class:`KMeans`.
    """

    prices_: Array

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        cap: float = 1.0,
        temperature: float = 0.05,
        sinkhorn_iter: int = 5,
        metric: str = "euclidean",
        init: str | Array = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 50,
        tol: float = 1e-4,
        sharded: bool = False,
        group: Group = None,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            n_clusters,
            metric=metric,
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            sharded=sharded,
            group=group,
            random_state=random_state,
            verbose=verbose,
        )
        self.cap, self.temperature, self.sinkhorn_iter = cap, temperature, sinkhorn_iter

    def fit(self, X: Array, y: Any = None, sample_weight: Any = None, *, drift: Any = None) -> Self:
        """Find the centroids and the sizes.

        Raises:
            TypeError, ValueError: as :meth:`KMeans.fit` does; sample weights, which have no size; a drift.
        """
        if sample_weight is not None:
            raise ValueError("sample_weight: balanced k-means counts samples; expected None")
        if drift is not None:
            raise ValueError("drift: balanced k-means keeps no bounds; expected None")
        check_count(self.sinkhorn_iter, "sinkhorn_iter", least=0)
        check_least(self.cap, "cap", 1)
        check_positive("temperature", self.temperature)
        return super().fit(X)

    def partial_fit(self, X: Array, y: Any = None, sample_weight: Any = None) -> Self:
        """Not offered: a cap holds for all samples together."""
        raise NotImplementedError("partial_fit: a cap needs all samples at once; use fit")

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`KMeans`, and the cap and the prices that kept it."""
        return {
            **super().state_dict(),
            "method": "BalancedKMeans",
            **{name: getattr(self, name) for name in _STATE},
            "prices": as_tensor(self.prices_, "prices_")[0].cpu().numpy().copy(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described, its centroids and prices as numpy."""
        cls._check_state(state)
        self = cls(**{name: state[name] for name in _STATE})
        vars(self).update(vars(KMeans.from_state_dict({**state, "method": "KMeans"})))
        self.prices_ = np.array(state["prices"], dtype=np.float64)
        return self

    def rename(self, names: Tensor) -> None:
        """As :meth:`CentroidModel.rename`; the prices follow."""
        super().rename(names)
        self.prices_ = self.prices_[names.argsort().to(self.prices_.device)]

    def _fit(self, points: Points, give: Any, drift: Any = None) -> None:
        survey = points.settle()
        check_enough(self.n_clusters, points.n_all, survey.n_directionless)
        starts = self._starts(points)
        points.weights = None  # a zero vector is no start, but takes up room as any other
        room = math.ceil(min(points.n_all, self.cap * points.n_all / self.n_clusters * _BARELY))
        best: tuple[Clustering, Tensor] | None = None
        for start in starts:
            run = self._run(points, start, room, self.tol * survey.variance)
            if best is None or is_better(run[0], best[0]):
                best = run
        assert best is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wide cap may leave a cluster empty
            self._keep(best[0], points, 0, give)
        self.prices_ = give(points.frame.unsee_square(best[1]))

    def _run(
        self, points: Points, centroids: Tensor, room: int, tolerance: float
    ) -> tuple[Clustering, Tensor]:
        prices = torch.zeros(self.n_clusters, dtype=torch.float64, device=points.device)
        last: Tensor | None = None
        history: list[float] = []
        n_iter, movement = 0, math.inf
        while True:
            prices = raise_prices(points, centroids, prices, room, self.temperature, self.sinkhorn_iter)
            labels = fill_rooms(points, centroids, prices, room)
            square = distances(points, centroids, labels)
            counts = points.ranks.sum(torch.bincount(labels, minlength=self.n_clusters))
            history.append(float(points.ranks.sum(square.sum())))
            changed = 1 if last is None else int(points.ranks.sum((labels != last).sum()))
            if not changed or n_iter >= self.max_iter or movement <= tolerance:
                break
            n_iter, last = n_iter + 1, labels
            sums = points.ranks.sum(cluster_sums(points, labels, self.n_clusters))
            step = Step(labels, square, sums, counts, history[-1], changed)
            moved = next_centroids(points, centroids, step, "keep")
            movement = float((moved.double() - centroids.double()).square().sum())
            centroids = moved
            if self.verbose and points.ranks.rank == 0:
                print(f"Iteration {n_iter}, inertia {points.frame.unsee_square(history[-1]):g}.")
        return Clustering(centroids, labels, counts, history[-1], history, n_iter, None), prices


def costs(points: Points, rows: Tensor, centroids: Tensor) -> Tensor:
    """Squared distance of rows that are seen from every centroid, float64 [n, K]."""
    x, c = points.directions(rows).double(), centroids.double()
    middle = c.mean(dim=0)
    x, c = x - middle, c - middle
    square = torch.addmm(c.square().sum(dim=1), x, c.T, alpha=-2).add_(x.square().sum(dim=1, keepdim=True))
    return square.clamp_(min=0)


def raise_prices(
    points: Points, centroids: Tensor, prices: Tensor, room: int, temperature: float, n_iter: int
) -> Tensor:
    """A few Sinkhorn updates of the prices, float64 [K], each a pass over the samples of all ranks."""
    k = len(centroids)
    nearest = torch.zeros((), dtype=torch.float64, device=points.device)
    for _, block in points.blocks():
        one = kmeans_assign(block, centroids, metric=points.metric)
        nearest += squared(points, block, one.distance).double().sum()
    nearest = points.ranks.sum(nearest)
    epsilon = temperature * float(nearest) / points.n_all
    if epsilon == 0:  # every sample lies on a centroid
        return prices
    for _ in range(n_iter):
        mass = prices.new_full((k,), -math.inf)
        for _, block in points.parts(width=2 * k):
            share = torch.log_softmax((prices - costs(points, block, centroids)) / epsilon, dim=1)
            mass = torch.logaddexp(mass, share.logsumexp(dim=0))
        mass = points.ranks.of_all(mass).logsumexp(dim=0)
        # A cluster that nobody wants costs nothing; one that is wanted too much gives way in bounded steps.
        step = (mass - math.log(room)).clamp(min=-50, max=50)
        prices = (prices - epsilon * step).clamp(max=0)
    return prices


def fill_rooms(points: Points, centroids: Tensor, prices: Tensor, room: int) -> Tensor:
    """A cluster for each sample, at most `room` samples a cluster, int64 [n] of this rank's rows.

    Samples ask the cheapest cluster that could still take them; a cluster that is asked too often keeps the
    cheapest, and the others ask on. Of equally cheap samples the first is kept.
    """
    k, n = len(centroids), points.n
    labels = torch.full((n,), -1, device=points.device)
    price = torch.empty(n, dtype=torch.float64, device=points.device)
    number = torch.arange(n, device=points.device) + points.first_row
    # What a sample must undercut, by cost and then by number, in each cluster.
    limit = torch.full((k,), math.inf, dtype=torch.float64, device=points.device)
    limit_number = torch.full((k,), points.n_all, device=points.device)
    asking = torch.arange(n, device=points.device)
    while True:
        step = points.rows_at_once(2 * k)
        for start in range(0, len(asking), step):
            rows = asking[start : start + step]
            cost = costs(points, points.rows(rows), centroids) - prices
            open_ = (cost < limit) | ((cost == limit) & (number[rows, None] < limit_number))
            cost = cost.where(open_, math.inf)
            price[rows], labels[rows] = cost.min(dim=1)
        # Only clusters that were asked, and are full or beyond, have to look who may stay.
        sizes = points.ranks.sum(torch.bincount(labels, minlength=k))
        crowded = points.ranks.sum(torch.bincount(labels[asking], minlength=k)) > 0
        crowded &= sizes >= room
        mine = crowded[labels].nonzero()[:, 0]
        everyone = torch.stack([price[mine], labels[mine].double(), number[mine].double()], dim=1)
        everyone = points.ranks.gather(everyone)
        order = everyone[:, 2].argsort()
        order = order[everyone[order, 0].argsort(stable=True)]
        order = order[everyone[order, 1].argsort(stable=True)]
        ids = everyone[order, 1].long()
        sizes = torch.bincount(ids, minlength=k)
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(len(ids), device=ids.device) - starts[ids]
        full = crowded.nonzero()[:, 0]
        last = order[starts[full] + room - 1]  # the dearest that a full cluster keeps
        limit[full], limit_number[full] = everyone[last, 0], everyone[last, 2].long()
        refused = everyone[order[place >= room], 2].long() - points.first_row
        if not len(refused):
            return labels
        asking = refused[(refused >= 0) & (refused < n)].sort().values
        labels[asking] = -1


_STATE = ("cap", "temperature", "sinkhorn_iter")
