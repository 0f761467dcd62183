"""What fitted centroids can do: predict, transform, score, on any kind of array."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from wscl_fast.clustering.arrays import as_samples, as_weights
from wscl_fast.clustering.base import check_count
from wscl_fast.clustering.bounds import Carried, nearest, squared
from wscl_fast.clustering.estimator import Estimator, not_fitted
from wscl_fast.clustering.points import Frame, Points, Ranks, check_metric
from wscl_fast.clustering.streamed import as_points
from wscl_fast.distributed.grouped import Grouped
from wscl_fast.functional import kmeans_assign

if TYPE_CHECKING:
    from typing_extensions import Self

# Samples: a numpy array (memory-mapped too), a tensor, an array with DLPack, lists, a data frame, files.
Array: TypeAlias = Any


class CentroidModel(Estimator):
    """An estimator whose clusters are the nearest of K centroids."""

    metric: str
    cluster_centers_: Array
    labels_: Array
    counts_: Array
    n_clusters_: int
    _frame: Frame  # how samples are seen
    _seen: Tensor  # the centroids as the frame sees them
    _seen_as: Array  # `cluster_centers_` when they were
    _carried: Carried | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "_seen" in state and self._seen_as is self.cluster_centers_:
            del state["_seen_as"]  # a pickler may make two of one array
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_seen" in state and "_seen_as" not in state:
            self._seen_as = self.cluster_centers_

    def rename(self, names: Tensor) -> None:
        """Give cluster k the number `names[k]`; labels and centroids follow.

        So do those of zero vectors under the cosine, which are as near to every centroid: `predict` says 0 of
        them all the same.

        Args:
            names: int64 [K], a permutation of 0 … K − 1.

        Raises:
            TypeError: the model was not fitted on a tensor, or `names` is no int64 tensor.
            ValueError: no permutation of all clusters.
        """
        self._check_fitted()
        if not isinstance(getattr(self, "labels_", None), Tensor):
            raise TypeError("rename: expected a model that was fitted on a tensor")
        _check_permutation(names, self.n_clusters_)
        names = names.to(self.labels_.device)
        take = names.argsort()
        self.labels_, self.counts_ = names[self.labels_], self.counts_[take]
        self._seen = self._seen[take]
        self.cluster_centers_ = self._seen_as = self.cluster_centers_[take]
        if self._carried is not None:
            old = self._carried
            self._carried = old._replace(assignment=names[old.assignment], centroids=old.centroids[take])

    def predict(self, X: Array) -> Array:
        """Nearest centroid of each sample.

        Args:
            X: samples [n, d].

        Returns:
            int64 [n], of the kind that X is.

        Raises:
            TypeError, ValueError: X is not samples of the columns that `fit` saw, or not finite.
        """
        points, centroids, give = self._view(X)
        return give(nearest(points, centroids))

    def nearest(self, X: Array, top: int) -> tuple[Array, Array]:
        """The nearest centroids of each sample, nearest first, and their distances.

        Args:
            X: samples [n, d].
            top: how many of each, 1 to K.

        Returns:
            int64 [n, top], and the distances [n, top], of the unit vectors when cosine.

        Raises:
            TypeError, ValueError: as :meth:`predict` does; another `top`.
        """
        points, centroids, give = self._view(X)
        top = check_count(top, "top", most=len(centroids))
        shape = (points.n, top)
        found = torch.empty(shape, dtype=torch.int64, device=points.device)
        distance = torch.empty(shape, dtype=points.dtype, device=points.device)
        for rows, block in points.blocks():
            several = kmeans_assign(block, centroids, metric=points.metric, top=top)
            found[rows] = several.assignment.view(-1, top)
            distance[rows] = squared(points, block, several.distance).view(-1, top).sqrt()
        return give(found), give(distance / points.frame.scale)

    @torch.no_grad()
    def transform(self, X: Array) -> Array:
        """Distance of each sample from every centroid.

        Args:
            X: samples [n, d].

        Returns:
            [n, K], of the unit vectors when cosine.

        Raises:
            TypeError, ValueError: as :meth:`predict` does.
        """
        points, centroids, give = self._view(X)
        far = torch.empty(points.n, len(centroids), dtype=points.dtype, device=points.device)
        # In float64 and from the middle of the centroids, ‖x‖² − 2 x·c + ‖c‖² keeps its digits.
        middle = centroids.double().mean(dim=0)
        c = centroids.double() - middle
        norms = c.square().sum(dim=1)
        for rows, block in points.parts(width=len(centroids)):
            if not bool(torch.isfinite(block).all()):
                raise ValueError("X: expected finite numbers, got NaN or infinity")
            x = points.directions(block).double() - middle
            square = torch.addmm(norms, x, c.T, alpha=-2).add_(x.square().sum(dim=1, keepdim=True))
            far[rows] = square.clamp_(min=0).sqrt_() / points.frame.scale
        return give(far)

    def score(self, X: Array, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of X under the fitted centroids.

        Args:
            X: samples [n, d].
            y: ignored; there for scikit-learn's pipelines.
            sample_weight: [n], at least 0.

        Raises:
            TypeError, ValueError: as :meth:`predict` does; weights that are none.
        """
        points, centroids, _ = self._view(X)
        weights = as_weights(sample_weight, points.x)
        square = torch.empty(points.n, dtype=torch.float64, device=points.device)
        for rows, block in points.blocks():
            one = kmeans_assign(block, centroids, metric=points.metric)
            square[rows] = squared(points, block, one.distance).double()
        square = points.frame.unsee_square(square)
        return -float(square.sum() if weights is None else square @ weights)

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Names of the columns of `transform`: "kmeans0", "kmeans1", …"""
        self._check_fitted()
        name = type(self).__name__.lower()
        return np.asarray([f"{name}{k}" for k in range(self.n_clusters_)], dtype=object)

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_clusters_"):
            raise not_fitted(self)

    def _view(self, X: Array) -> tuple[Points, Tensor, Any]:
        """X as the fitted centroids see it, the centroids beside it, and the way back to X's kind."""
        self._check_fitted()
        points, give = as_points(X, metric=check_metric(self.metric), frame=self._frame, least=0)
        self._check_columns(X, points.dim)
        return points, self._centroids().to(points.device, points.dtype), give

    def _take_centroids(self, centroids: Tensor, frame: Frame) -> None:
        """Predict by centroids that a fit found, [K, d] as they are given out, and see samples as it did."""
        self.cluster_centers_ = self._seen_as = centroids
        self._frame, self._seen = frame, frame.see(centroids)
        self.n_clusters_, self.n_features_in_ = centroids.shape

    def _centroids(self) -> Tensor:
        """The centroids as the frame sees them; from `cluster_centers_` where a user set that anew."""
        if self._seen_as is self.cluster_centers_:
            return self._seen
        return self._frame.see(as_samples(self.cluster_centers_, "cluster_centers_").x)


def _check_permutation(names: object, n_clusters: int) -> None:
    if not isinstance(names, Tensor) or names.dtype != torch.int64:
        got = names.dtype if isinstance(names, Tensor) else type(names).__name__
        raise TypeError(f"names: expected an int64 tensor, got {got}")
    if names.shape != (n_clusters,):
        raise ValueError(f"names: expected shape ({n_clusters},), got {tuple(names.shape)}")
    if not torch.equal(names.sort().values, torch.arange(n_clusters, device=names.device)):
        raise ValueError(
            f"names: expected a permutation of 0 … {n_clusters - 1}, got {len(torch.unique(names))} numbers "
            f"from {int(names.min())} to {int(names.max())}"
        )


class WeightedModel(Grouped, CentroidModel):
    """One whose `fit` takes a weight of each sample, and may find them on several ranks."""

    sharded: bool

    def __sklearn_clone__(self) -> Self:
        """What `sklearn.clone` makes: a new one, of copies of the parameters but for the group."""
        return type(self)(**copy.deepcopy(self.get_params(deep=False), {id(self.group): self.group}))

    def _points(self, X: Array, sample_weight: Any, **alike: Any) -> tuple[Points, Any]:
        """Samples to fit, of all ranks if sharded, and the way back to X's kind.

        Ranks have to agree about the parameters, and about what is `alike`.
        """
        ranks = Ranks(self.sharded, self.group)
        if not ranks.alone:
            own = ("group", "random_state", "verbose")
            alike = {name: value for name, value in self.get_params().items() if name not in own} | alike
            if "init" in alike and not isinstance(alike["init"], str):
                alike["init"] = as_samples(alike["init"], "init").x
            if "checkpoint" in alike:  # each may have its own
                alike["checkpoint"] = alike["checkpoint"] is not None
        return as_points(
            X,
            sample_weight=sample_weight,
            metric=check_metric(self.metric),
            ranks=ranks,
            least=0 if self.sharded else 1,  # an empty shard is one too
            alike=alike,
        )

    def fit_predict(self, X: Array, y: Any = None, sample_weight: Any = None) -> Array:
        """`fit(X).labels_`."""
        model: Any = self
        return model.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Array, y: Any = None, sample_weight: Any = None) -> Array:
        """`fit(X).transform(X)`."""
        model: Any = self
        return model.fit(X, sample_weight=sample_weight).transform(X)
