"""Nested clusterings of several sizes, even over the space the samples fill rather than over the samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wscl_fast.clustering.arrays import seed_of
from wscl_fast.clustering.base import check_count
from wscl_fast.clustering.bounds import distances, nearest
from wscl_fast.clustering.centroid_model import Array, CentroidModel
from wscl_fast.clustering.kmeans import KMeans
from wscl_fast.clustering.points import Points, check_metric
from wscl_fast.clustering.streamed import as_points

if TYPE_CHECKING:
    from typing_extensions import Self


class HierarchicalKMeans(CentroidModel):
    """K-means of the samples, k-means of its centroids, and so on: clusters within clusters.

    With `n_resampling` > 0 each level is made even: of every cluster only the few members nearest to its
    centroid are kept, these are clustered anew, and so again; crowded regions lose weight each time, and
    the centroids come to lie evenly over the support of the data.

    Source: Vo et al., *Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach*,
    TMLR 2024, arXiv 2405.15613, algorithm 1 and section 3.4 (sampling).

    Args:
        n_clusters: K of each level, falling: the first clusters the samples.
        n_resampling: rounds of resampling on each level.
        members: samples (or centroids of the level below) of each cluster that a round keeps.
        metric, max_iter, tol, random_state: as of :class:`KMeans`; `init` too, "k-means||" by default.

    Attributes:
        levels_: centroids of each level [K_l, d].
        parents_: int64 [K_l] for each level but the last: the cluster above.
        labels_: int64 [n], clusters of the first level.
        cluster_centers_: those of the first level.
        inertia_: of the first level.
    """

    levels_: list[Array]
    parents_: list[Array]
    inertia_: float

    def __init__(
        self,
        n_clusters: Sequence[int] = (64, 8),
        *,
        n_resampling: int = 0,
        members: int = 10,
        metric: str = "euclidean",
        init: str = "k-means||",
        max_iter: int = 50,
        tol: float = 1e-4,
        random_state: Any = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_resampling = n_resampling
        self.members = members
        self.metric = metric
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, X: Array, y: Any = None) -> Self:
        """Cluster the samples, then the centroids of each level.

        Raises:
            TypeError, ValueError: as :meth:`KMeans.fit` does; levels that do not fall.
        """
        if not isinstance(self.n_clusters, Iterable):
            raise TypeError(f"n_clusters: expected several ints, got {type(self.n_clusters).__name__}")
        sizes = [check_count(k, "n_clusters") for k in self.n_clusters]
        if not sizes or any(a <= b for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"n_clusters: expected falling numbers of clusters, got {sizes}")
        check_count(self.n_resampling, "n_resampling", least=0)
        check_count(self.members, "members")
        metric = check_metric(self.metric)
        points, give = as_points(X, metric=metric)
        seed = seed_of(self.random_state)
        levels: list[Tensor] = []
        links: list[Tensor] = []
        here = points
        for k in sizes:
            here.settle()
            centroids, labels = self._level(here, k, seed)
            # Upper levels see centroids, and all levels are kept as the samples' frame sees them.
            levels.append(centroids if here is points else here.frame.unsee(centroids))
            links.append(labels)
            here = Points(levels[-1], metric=metric)
        self._frame, self._seen = points.frame, levels[0]
        unseen = [give(points.frame.unsee(c)) for c in levels]
        self.levels_, self.parents_ = unseen, [give(ids) for ids in links[1:]]
        self.cluster_centers_ = self._seen_as = unseen[0]
        self.labels_ = give(links[0])
        self.counts_ = give(torch.bincount(links[0], minlength=sizes[0]))
        square = distances(points, levels[0], links[0])
        self.inertia_ = points.frame.unsee_square(float(square.sum()))
        self.n_clusters_ = sizes[0]
        self._take_columns(X, points.dim)
        return self

    def rename(self, names: Tensor) -> None:
        """As :meth:`CentroidModel.rename`, for the clusters of the first level."""
        super().rename(names)
        self.levels_[0] = self.cluster_centers_
        if self.parents_:
            self.parents_[0] = self.parents_[0][names.argsort().to(self.parents_[0].device)]

    def predict(self, X: Array, level: int = 0) -> Array:
        """Cluster of each sample on a level: the nearest on the first, then up by the parents.

        Args:
            X: samples [n, d].
            level: 0 is the first, of the most clusters.

        Returns:
            int64 [n], of the kind that X is.

        Raises:
            TypeError, ValueError: as :meth:`CentroidModel.predict` does; no such level.
        """
        points, centroids, give = self._view(X)
        return give(self._up(nearest(points, centroids), level))

    def labels_of(self, level: int) -> Array:
        """The training samples' clusters on a level, int64 [n].

        Args:
            level: 0 is the first, of the most clusters.

        Raises:
            TypeError, ValueError: no such level.
        """
        self._check_fitted()
        labels = self._up(torch.as_tensor(self.labels_), level)
        return labels if isinstance(self.labels_, Tensor) else labels.numpy()

    def sample(self, size: int, random_state: Any = 0) -> Array:
        """Numbers of `size` training samples, even over the clusters of every level, int64 [size], ascending.

        From the top down each cluster's share is dealt to its children as evenly as their sizes allow.

        Args:
            size: how many.
            random_state: an int (the same int draws the same samples), a numpy generator, or None.

        Raises:
            TypeError, ValueError: more than there are samples; a `random_state` of another sort.
        """
        self._check_fitted()
        labels = torch.as_tensor(self.labels_).cpu()
        if check_count(size, "size") > len(labels):
            raise ValueError(f"size: expected at most the {len(labels)} samples, got {size}")
        generator = torch.Generator().manual_seed(seed_of(random_state))
        parents = [torch.as_tensor(p).cpu() for p in self.parents_]
        counts = [torch.bincount(labels, minlength=self.n_clusters_)]
        for parent, level in zip(parents, self.levels_[1:], strict=True):
            counts.append(torch.zeros(len(level), dtype=torch.int64).index_add_(0, parent, counts[-1]))
        shares = even_shares(counts[-1], size)
        for parent, below in zip(parents[::-1], counts[-2::-1], strict=True):
            dealt = torch.zeros_like(below)
            for cluster, share in enumerate(shares.tolist()):
                children = (parent == cluster).nonzero()[:, 0]
                dealt[children] = even_shares(below[children], share)
            shares = dealt
        order = torch.randperm(len(labels), generator=generator)
        order = order[labels[order].argsort(stable=True)]
        starts = counts[0].cumsum(0) - counts[0]
        place = torch.arange(len(labels)) - starts[labels[order]]
        chosen = order[place < shares[labels[order]]].sort().values
        return chosen if isinstance(self.labels_, Tensor) else chosen.numpy()

    def fit_predict(self, X: Array, y: Any = None) -> Array:
        """`fit(X).labels_`."""
        return self.fit(X).labels_

    def fit_transform(self, X: Array, y: Any = None) -> Array:
        """`fit(X).transform(X)`."""
        return self.fit(X).transform(X)

    def _up(self, labels: Tensor, level: int) -> Tensor:
        check_count(level, "level", least=0, most=len(self.levels_) - 1)
        for parent in self.parents_[:level]:
            labels = torch.as_tensor(parent).to(labels.device)[labels]
        return labels

    def _level(self, points: Points, k: int, seed: int) -> tuple[Tensor, Tensor]:
        """Centroids, as the points' frame sees them, and labels of one level."""
        settings: dict[str, Any] = {"metric": self.metric, "max_iter": self.max_iter, "tol": self.tol}
        model = KMeans(k, init=self.init, random_state=seed, **settings).fit(points.x)
        centroids, labels = model._seen, torch.as_tensor(model.labels_).to(points.device)
        for number in range(self.n_resampling):
            square = distances(points, centroids, labels)
            order = square.argsort(stable=True)
            order = order[labels[order].argsort(stable=True)]
            sizes = torch.bincount(labels, minlength=k)
            place = torch.arange(points.n, device=order.device) - (sizes.cumsum(0) - sizes)[labels[order]]
            kept = order[place < self.members].sort().values
            rows = points.rows(kept)
            usable = int(rows.any(dim=1).sum()) if points.metric == "cosine" else len(rows)
            if usable < k:  # few distinct samples: their clusters have no members to spare
                break
            # A fresh start: from the last centroids, each would stay among its own few members.
            few = KMeans(k, init=self.init, random_state=seed + number + 1, **settings)
            centroids = torch.as_tensor(few.fit(rows).cluster_centers_).to(points.dtype)
            labels = nearest(points, centroids)
        return centroids, labels


def even_shares(sizes: Tensor, total: int) -> Tensor:
    """`total` dealt as evenly as sizes allow, int64 [k]; what is left goes to the first."""
    total = min(total, int(sizes.sum()))
    low, high = 0, int(sizes.max()) if len(sizes) else 0
    while low < high:  # the highest level whose sum is at most the total
        middle = (low + high + 1) // 2
        if int(sizes.clamp(max=middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    shares = sizes.clamp(max=low)
    spare = total - int(shares.sum())
    more = (sizes > low).nonzero()[:spare, 0]
    shares[more] += 1
    return shares
