"""Bisecting k-means: a tree of splits in two, for so many clusters that K distances a sample are too many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.arrays import seed_of
from wscl_fast.clustering.base import check_choice, check_count, check_enough, check_least
from wscl_fast.clustering.bounds import cluster_sums, distances
from wscl_fast.clustering.centroid_model import Array, WeightedModel
from wscl_fast.clustering.halves import halve, nearer_is_right, rows_for
from wscl_fast.clustering.points import Points
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional._checks import check_bool
from wscl_fast.functional.kmeans import check_finite

if TYPE_CHECKING:
    from typing_extensions import Self

SPLITS = ("inertia", "size")


class BisectingKMeans(WeightedModel):
    """Splits the worst cluster in two, again and again, until there are K.

    Time grows with n d log K, not with n d K, for `fit` as for `predict`, which goes down the tree. Equals in
    idea `sklearn.cluster.BisectingKMeans`, but that all clusters which may still have to be split are split
    in the same passes over the samples, at most `max_iter` + 3 of them for each level of the tree, whatever
    K; samples may be in files or on several ranks. A cluster whose samples are all alike is not split: then
    there are fewer than K.

    Source: Steinbach, Karypis & Kumar, *A Comparison of Document Clustering Techniques*, 2000.

    Args:
        n_clusters: K.
        metric: "euclidean" or "cosine".
        split: which cluster comes next, the one of most "inertia" or of largest "size" (weight).
        max_iter: most updates in a split.
        tol: as of :class:`KMeans`, in each split.
        sharded, group: as of :class:`KMeans`: X of each process is its share of the data.
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
        sharded: bool = False,
        group: Group = None,
        random_state: Any = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.split = split
        self.max_iter = max_iter
        self.tol = tol
        self.sharded = sharded
        self.group = group
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, X: Array, y: Any = None, sample_weight: Any = None) -> Self:
        """Grow the tree.

        Raises:
            TypeError, ValueError: as :meth:`KMeans.fit` does, but that a cosine needs one sample only that is
                not zero.
        """
        check_count(self.n_clusters, "n_clusters")
        check_count(self.max_iter, "max_iter")
        tol = check_least(self.tol, "tol", 0)
        check_choice(self.split, "split", SPLITS)
        check_bool("sharded", self.sharded)
        points, give = self._points(X, sample_weight)
        survey = points.settle()
        check_enough(self.n_clusters, points.n_all, 0)  # where fewer are not zero there are fewer leaves
        seed = points.ranks.first(torch.tensor(seed_of(self.random_state), device=points.device))
        generator = torch.Generator().manual_seed(int(seed))
        growing = _Growing(points, self.split, survey.variance)
        growing.grow(self.n_clusters, self.max_iter, tol, generator)
        self._tree, labels = growing.pruned(self.n_clusters)
        leaves = self._tree.number >= 0
        centroids = self._tree.centers[leaves]
        counts = torch.bincount(labels, points.weights, minlength=len(centroids))
        counts = points.ranks.sum(counts if points.weights is None else counts.double())
        square = distances(points, centroids, labels)
        total = points.ranks.sum(square.sum() if points.weights is None else square @ points.weights)
        self.inertia_ = points.frame.unsee_square(float(total)) + survey.lost
        self._frame, self._seen = points.frame, centroids
        self.cluster_centers_ = self._seen_as = give(points.frame.unsee(centroids))
        self.labels_, self.counts_ = give(labels), give(counts)
        self.n_clusters_ = len(centroids)
        self._take_columns(X, points.dim)
        return self

    def rename(self, names: Tensor) -> None:
        """As :meth:`CentroidModel.rename`; the leaves of the tree follow."""
        super().rename(names)
        number = self._tree.number
        self._tree = self._tree._replace(number=names.to(number.device)[number].where(number >= 0, -1))

    def predict(self, X: Array) -> Array:
        """The leaf that each sample comes to, going to the nearer child at every node, int64 [n].

        Raises:
            ValueError: NaN or infinity in X, or other columns than `fit` saw.
        """
        points, _, give = self._view(X)
        tree = _Tree(*(part.to(points.device) for part in self._tree))
        found = torch.empty(points.n, dtype=torch.int64, device=points.device)
        for rows, block in rows_for(points, len(tree.centers)):
            check_finite("X", block)
            at = torch.zeros(len(block), dtype=torch.int64, device=points.device)
            inner = torch.arange(len(block), device=points.device)
            while len(inner := inner[tree.number[at[inner]] < 0]):
                left = tree.left[at[inner]]
                some = block if len(inner) == len(block) else block[inner]
                right, _ = nearer_is_right(points, some, tree.centers, left)
                at[inner] = left + right
            found[rows] = tree.number[at]
        return give(found)


class _Tree(NamedTuple):
    """Nodes, parents before their children; the two children of a node side by side."""

    centers: Tensor  # [nodes, d]
    left: Tensor  # int64 [nodes], the first child, −1 of a leaf
    number: Tensor  # int64 [nodes], of a leaf, in their order; −1 of another node


class _Growing:
    """A tree in which all nodes are split that could be among the K − 1 of most worth.

    A node is worth no more than its parent, so splitting the worthiest leaf again and again splits the K − 1
    worthiest nodes of the tree that is grown without end, whatever the order.
    """

    def __init__(self, points: Points, split: str, variance: float) -> None:
        self.points, self.by_size = points, split == "size"
        device = points.device
        self.node = torch.zeros(points.n, dtype=torch.int64, device=device)  # the deepest of each row
        sums = points.ranks.sum(cluster_sums(points, self.node, 1))
        rows = float(points.n) if points.weights is None else float(points.weights.sum())
        weight = float(points.ranks.sum(sums.new_tensor(rows)))
        if weight == 0:
            raise ValueError("X: expected a sample that is not zero and has a weight (cosine), got none")
        self.centers = points.directions((sums / weight).to(points.dtype))
        self.left = torch.full((1,), -1, device=device)
        self.parent = torch.zeros(1, dtype=torch.int64, device=device)
        self.worth = sums.new_full((1,), torch.inf)
        self.spread = sums.new_full((1,), variance)  # of a node's samples, a column
        self.alike = torch.zeros(1, dtype=torch.bool, device=device)  # nodes that cannot be split

    def grow(self, n_clusters: int, max_iter: int, tol: float, generator: torch.Generator) -> None:
        """Split level by level until the worthiest nodes all are split."""
        while True:
            worthy = self._worthiest(n_clusters - 1)
            leaves = worthy[self.left[worthy] < 0].sort().values
            if not len(leaves):
                return
            group = torch.full_like(self.left, -1)
            group[leaves] = torch.arange(len(leaves), device=leaves.device)
            halves = halve(
                self.points,
                group[self.node],
                tol * self.spread[leaves],
                max_iter=max_iter,
                generator=generator,
            )
            self.alike[leaves[~halves.split]] = True
            nodes, split = leaves[halves.split], halves.split
            if not len(nodes):
                continue
            self.left[nodes] = len(self.left) + 2 * torch.arange(len(nodes), device=nodes.device)
            parent = nodes.repeat_interleave(2)
            weights, inertias = halves.weights[split].view(-1), halves.inertias[split].view(-1)
            worth = weights if self.by_size else inertias
            self.centers = torch.cat([self.centers, halves.centers[split].flatten(0, 1)])
            self.worth = torch.cat([self.worth, torch.minimum(worth, self.worth[parent])])
            self.spread = torch.cat([self.spread, inertias / weights / self.points.dim])
            self.parent = torch.cat([self.parent, parent])
            self.left = torch.cat([self.left, torch.full_like(parent, -1)])
            self.alike = torch.cat([self.alike, torch.zeros_like(parent, dtype=torch.bool)])
            down = self.left[self.node]
            self.node = (down + halves.right).where(down >= 0, self.node)

    def pruned(self, n_clusters: int) -> tuple[_Tree, Tensor]:
        """The tree of the worthiest nodes, and the leaf's number of each row, int64 [n]."""
        inner = torch.zeros_like(self.alike)
        inner[self._worthiest(n_clusters - 1)] = True
        kept = inner | inner[self.parent]
        kept[0] = True
        place = kept.cumsum(0) - 1
        leaf = kept & ~inner
        number = (leaf.cumsum(0) - 1).where(leaf, -1)
        node = self.node
        while len(below := (~kept[node]).nonzero()[:, 0]):
            node = node.index_copy(0, below, self.parent[node[below]])
        left = place[self.left.clamp(min=0)].where(inner, -1)
        return _Tree(self.centers[kept], left[kept], number[kept]), number[node]

    def _worthiest(self, count: int) -> Tensor:
        """Nodes that can be split, or are, by their worth; of equals the first."""
        able = (~self.alike).nonzero()[:, 0]
        return able[self.worth[able].argsort(descending=True, stable=True)[:count]]
