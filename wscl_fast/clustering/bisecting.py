"""Bisecting k-means: a tree of splits in two, for so many clusters that K distances a sample are too many."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wscl_fast.clustering.arrays import seed_of
from wscl_fast.clustering.base import check_count
from wscl_fast.clustering.bounds import cluster_sums, distances
from wscl_fast.clustering.centroid_model import Array, WeightedModel
from wscl_fast.clustering.inits import choose_start
from wscl_fast.clustering.lloyd import lloyd
from wscl_fast.clustering.points import Points, check_metric
from wscl_fast.clustering.streamed import as_points

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS = ("inertia", "size")


class BisectingKMeans(WeightedModel):
    """Splits the worst cluster in two, again and again, until there are K.

    Time grows with n d log K, not with n d K, for `fit` as for `predict`, which goes down the tree. Equals in
    idea `sklearn.cluster.BisectingKMeans`. A cluster whose samples are all alike is not split: then there are
    fewer than K.

    Source: Steinbach, Karypis & Kumar, *A Comparison of Document Clustering Techniques*, 2000.

    Args:
        n_clusters: K.
        metric: "euclidean" or "cosine".
        split: which cluster comes next, the one of most "inertia" or of largest "size" (weight).
        max_iter: most updates in a split.
        tol: as of :class:`KMeans`, in each split.
        random_state: as of :class:`KMeans`.

    Attributes:
        cluster_centers_: [n_clusters_, d], of the leaves.
        labels_: int64 [n].
        inertia_: weighted sum of squared distances from the centroids.
        counts_: weight of each cluster [n_clusters_].
        n_clusters_: how many there are.
    """

    inertia_: float

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: str = "euclidean",
        split: str = "inertia",
        max_iter: int = 20,
        tol: float = 1e-4,
        random_state: Any = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.split = split
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, X: Array, y: Any = None, sample_weight: Any = None) -> Self:
        """Grow the tree.

        Raises:
            TypeError, ValueError: as :meth:`KMeans.fit` does; X in files.
        """
        check_count(self.n_clusters, "n_clusters")
        check_count(self.max_iter, "max_iter")
        if self.split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {self.split!r}")
        points, give = as_points(X, sample_weight=sample_weight, metric=check_metric(self.metric))
        if not points.in_memory:
            raise ValueError("X: bisecting k-means wants its samples in memory, got files")
        points.settle()
        if points.n < self.n_clusters:
            raise ValueError(f"n_clusters: expected at most the {points.n} samples, got {self.n_clusters}")
        generator = torch.Generator().manual_seed(seed_of(self.random_state))
        tree = _Tree(points)
        queue = [(-tree.worth(0, self.split), 0)]
        leaves = 1
        while queue and leaves < self.n_clusters:
            _, node = heapq.heappop(queue)
            for child in tree.grow(node, self.max_iter, self.tol, generator):
                heapq.heappush(queue, (-tree.worth(child, self.split), child))
            leaves = tree.leaves()
        labels, centroids = tree.numbered()
        counts = torch.bincount(labels, points.weights, minlength=len(centroids))
        square = distances(points, centroids, labels)
        total = square.sum() if points.weights is None else square @ points.weights
        self.inertia_ = float(total) / points.frame.scale**2
        self._tree = tree.frozen()
        self._frame, self._seen = points.frame, centroids
        self.cluster_centers_ = self._seen_as = give(points.frame.unsee(centroids))
        self.labels_, self.counts_ = give(labels), give(counts)
        self.n_clusters_ = len(centroids)
        self._take_columns(X, points.dim)
        return self

    def predict(self, X: Array) -> Array:
        """The leaf that each sample comes to, going to the nearer child at every node, int64 [n]."""
        points, _, give = self._view(X)
        centers, children, numbers = (part.to(points.device) for part in self._tree)
        node = torch.zeros(points.n, dtype=torch.int64, device=points.device)
        for rows, block in points.parts():
            x, at = points.directions(block), node[rows]
            while bool((inner := (children[at, 0] >= 0).nonzero()[:, 0]).numel()):
                pair = children[at[inner]]  # [m, 2]
                far = torch.stack([(x[inner] - centers[pair[:, s]]).square().sum(dim=1) for s in (0, 1)])
                at[inner] = torch.where(far[1] < far[0], pair[:, 1], pair[:, 0])
            node[rows] = at
        return give(numbers[node])


class _Tree:
    """Nodes with their rows, which stand in one array, each node's side by side."""

    def __init__(self, points: Points) -> None:
        self.points = points
        self.order = torch.arange(points.n, device=points.device)
        self.spans = [(0, points.n)]
        sums = cluster_sums(points, torch.zeros_like(self.order), 1)
        weight = points.n if points.weights is None else points.weights.sum()
        self.centers = [points.directions((sums / weight).to(points.dtype))[0]]
        self.inertias, self.weights = [1.0], [1.0]
        self.children: list[tuple[int, int]] = [(-1, -1)]
        self._leaves = 1

    def worth(self, node: int, split: str) -> float:
        """How much a node asks to be split."""
        return self.inertias[node] if split == "inertia" else self.weights[node]

    def leaves(self) -> int:
        """Nodes without children."""
        return self._leaves

    def grow(self, node: int, max_iter: int, tol: float, generator: torch.Generator) -> list[int]:
        """Split a node in two; returns the children, or none where all its samples are alike."""
        start, stop = self.spans[node]
        rows = self.order[start:stop]
        if len(rows) < 2:
            return []
        whole = self.points
        weights = None if whole.weights is None else whole.weights[rows]
        if weights is not None and int((weights > 0).sum()) < 2:
            return []
        part = Points(whole.rows(rows), weights=weights, metric=whole.metric)
        spread = part.directions(part.x).double().var(dim=0, correction=0).mean()
        begin = choose_start(part, 2, "k-means++", generator)
        run = lloyd(part, begin, max_iter=max_iter, tolerance=tol * float(spread), algorithm="lloyd")
        right = run.assignment == 1
        if not bool(right.any()) or bool(right.all()):
            return []
        square = distances(part, run.centroids, run.assignment)
        share = square if weights is None else square * weights
        middle = start + int((~right).sum())
        self.order[start:stop] = torch.cat([rows[~right], rows[right]])
        made = []
        for side, span in enumerate(((start, middle), (middle, stop))):
            mine = run.assignment == side
            made.append(len(self.spans))
            self.spans.append(span)
            self.centers.append(run.centroids[side])
            self.inertias.append(float(share[mine].sum()))
            self.weights.append(float(mine.sum() if weights is None else weights[mine].sum()))
            self.children.append((-1, -1))
        self.children[node] = (made[0], made[1])
        self._leaves += 1
        return made

    def numbered(self) -> tuple[Tensor, Tensor]:
        """Labels of the rows and centroids of the leaves, in the order in which the leaves were made."""
        labels = torch.empty_like(self.order)
        centers: list[Tensor] = []
        for node, (left, _) in enumerate(self.children):
            if left < 0:
                start, stop = self.spans[node]
                labels[self.order[start:stop]] = len(centers)
                centers.append(self.centers[node])
        return labels, torch.stack(centers)

    def frozen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centers, children and the leaves' numbers, of all nodes: what `predict` needs."""
        children = torch.tensor(self.children)
        numbers = torch.where(children[:, 0] < 0, (children[:, 0] < 0).cumsum(0) - 1, -1)
        return torch.stack(self.centers), children, numbers
