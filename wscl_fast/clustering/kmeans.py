"""K-means on features, for when there is no auxiliary information but a learned representation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from wscl_fast.clustering.base import ClusterMethod, check_count
from wscl_fast.clustering.lloyd import Clustering, assign, check_metric, lloyd, seed_points

if TYPE_CHECKING:
    from typing_extensions import Self

Array: TypeAlias = npt.NDArray[Any] | Tensor


class KMeans(ClusterMethod[Array, Array]):
    """Exact k-means (Lloyd's algorithm) in float32 or float64 on any device, in memory linear in n + K.

    Equals `sklearn.cluster.KMeans(n_clusters, init=…, n_init=…, algorithm="lloyd")`, from the same start
    the same clusters. numpy in gives numpy out; a torch tensor gives tensors on its device.

    Sources: Lloyd 1982; Arthur & Vassilvitskii 2007 (seeding); Dhillon & Modha 2001 (cosine).

    Args:
        n_clusters: K.
        metric: "euclidean", or "cosine" for spherical k-means: points and centroids scaled to length 1. A
            zero vector has no direction: it takes no part in the fit and belongs to cluster 0.
        init: "k-means++", or the centroids to start from [K, d] (a warm start; one run, whatever `n_init`).
        n_init: runs from different starts, of which the one of lowest inertia is kept.
        max_iter: most passes over the data in a run.
        tol: a run ends when the squared movement of the centroids is at most `tol` times the mean
            variance of the data's columns, or when no assignment changes.
        seed: of the random starts; the same seed gives the same clusters.

    Attributes:
        centroids_: [K, d], the dtype of the data; of length 1 when cosine.
        labels_: int64 [n], the training samples' clusters.
        inertia_: sum of squared distances from the centroids, of the unit vectors when cosine.
        n_iter_: passes over the data in the run that was kept.
        n_clusters_: K.
    """

    centroids_: Array
    labels_: Array
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: str = "euclidean",
        init: str | Array = "k-means++",
        n_init: int = 1,
        max_iter: int = 50,
        tol: float = 1e-4,
        seed: int = 0,
    ) -> None:
        self.n_clusters = check_count(n_clusters, "n_clusters")
        self.metric = check_metric(metric)
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f"init: expected 'k-means++' or an array of centroids, got {init!r}")
        self.init = init
        self.n_init = check_count(n_init, "n_init")
        self.max_iter = check_count(max_iter, "max_iter")
        if not 0 <= tol < float("inf"):
            raise ValueError(f"tol: expected a finite number of at least 0, got {tol}")
        self.tol = float(tol)
        self.seed = check_count(seed, "seed", least=0)

    @torch.no_grad()
    def fit(self, info: Array) -> Self:
        """Find the centroids.

        Args:
            info: features, float32 or float64 [n, d].

        Raises:
            TypeError: not a numpy array or tensor, or of another dtype.
            ValueError: not [n, d], NaN or infinity in it, fewer samples than clusters, or an `init` that
                does not fit.
        """
        features = _checked(info, "info")
        x, origin = self._prepare(features)
        if len(x) < self.n_clusters:
            usable = "samples" if len(x) == len(features) else "samples that are not zero"
            raise ValueError(f"n_clusters: expected at most the {len(x)} {usable}, got {self.n_clusters}")
        variance = float(x.var(dim=0, correction=0).mean())
        if not np.isfinite(variance):
            raise ValueError(
                f"info: expected values whose square fits {x.dtype}, got up to {x.abs().max():g}"
            )

        best: Clustering | None = None
        for start in self._starts(x, origin):
            run = lloyd(
                x,
                start,
                spherical=self.metric == "cosine",
                max_iter=self.max_iter,
                tolerance=self.tol * variance,
            )
            if best is None or run.inertia < best.inertia:
                best = run
        assert best is not None  # n_init is at least 1
        centroids = best.centroids + origin
        labels, self.inertia_ = best.assignment, best.inertia
        if len(x) < len(features):  # zero vectors sat out; each is at distance 1 of its cluster
            labels, _ = assign(features, centroids, self.metric)
            self.inertia_ += len(features) - len(x)
        n_empty = self.n_clusters - int(torch.bincount(labels).count_nonzero())
        if n_empty:
            warnings.warn(
                f"k-means left {n_empty} of {self.n_clusters} clusters empty: the data has too few distinct "
                f"samples, or max_iter={self.max_iter} is too small",
                UserWarning,
                stacklevel=2,
            )
        self.centroids_, self.labels_ = _like(centroids, info), _like(labels, info)
        self.n_iter_ = best.n_iter
        self.n_clusters_ = self.n_clusters
        return self

    @overload
    def predict(self, info: npt.NDArray[Any]) -> npt.NDArray[Any]: ...
    @overload
    def predict(self, info: Tensor) -> Tensor: ...
    def predict(self, info: Array) -> Array:
        """Nearest centroid of each sample, int64 [n], numpy for numpy and a tensor for a tensor."""
        self._check_fitted()
        x = _checked(info, "info")
        centroids = torch.as_tensor(self.centroids_).to(x)
        if x.shape[1] != centroids.shape[1]:
            raise ValueError(f"info: expected {centroids.shape[1]} features as fitted, got {x.shape[1]}")
        return _like(assign(x, centroids, self.metric)[0], info)

    @overload
    def fit_predict(self, info: npt.NDArray[Any]) -> npt.NDArray[Any]: ...
    @overload
    def fit_predict(self, info: Tensor) -> Tensor: ...
    def fit_predict(self, info: Array) -> Array:
        """`fit(info).labels_`."""
        return self.fit(info).labels_

    def state_dict(self) -> dict[str, Any]:
        """The centroids and how they were found; neither `init` nor the training samples' labels."""
        self._check_fitted()
        return {
            "method": "KMeans",
            "n_clusters": self.n_clusters,
            "metric": self.metric,
            "n_init": self.n_init,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "seed": self.seed,
            "centroids": torch.as_tensor(self.centroids_).cpu().numpy().copy(),
            "inertia": self.inertia_,
            "n_iter": self.n_iter_,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described, its centroids as numpy."""
        cls._check_state(state)
        names = ("metric", "n_init", "max_iter", "tol", "seed")
        self = cls(state["n_clusters"], **{name: state[name] for name in names})
        self.centroids_ = np.asarray(state["centroids"])
        self.inertia_, self.n_iter_ = float(state["inertia"]), int(state["n_iter"])
        self.n_clusters_ = self.n_clusters
        return self

    def _prepare(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The points that Lloyd's iteration sees, and the origin they are seen from."""
        if self.metric == "cosine":
            x = normalize(features[(features != 0).any(dim=1)], dim=1, eps=torch.finfo(features.dtype).tiny)
            return x, torch.zeros_like(x[:1])
        origin = features.mean(dim=0, keepdim=True, dtype=torch.float64).to(features.dtype)
        return features - origin, origin

    def _starts(self, x: Tensor, origin: Tensor) -> list[Tensor]:
        """The centroids that each run starts from."""
        if not isinstance(self.init, str):
            start = _checked(self.init, "init").to(x)
            if start.shape != (self.n_clusters, x.shape[1]):
                expected = f"[{self.n_clusters}, {x.shape[1]}]"
                raise ValueError(f"init: expected centroids {expected}, got {list(start.shape)}")
            if self.metric == "cosine":
                if not bool((start != 0).any(dim=1).all()):
                    raise ValueError("init: expected centroids with a direction (cosine), got a zero vector")
                return [normalize(start, dim=1, eps=torch.finfo(x.dtype).tiny)]
            return [start - origin]
        generator = torch.Generator().manual_seed(self.seed)
        centred = x - x.mean(dim=0) if self.metric == "cosine" else x
        return [x[seed_points(centred, self.n_clusters, generator)] for _ in range(self.n_init)]


def _checked(array: Array, name: str) -> Tensor:
    if not isinstance(array, np.ndarray | Tensor):
        raise TypeError(f"{name}: expected a numpy array or a torch tensor, got {type(array).__name__}")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float64"):
        raise TypeError(f"{name}: expected float32 or float64, got {dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected [samples, features], got shape {list(array.shape)}")
    # torch takes no negative strides and warns of a read-only memory map
    x = (
        array.detach()
        if isinstance(array, Tensor)
        else torch.from_numpy(np.require(array, requirements=["C", "W"]))
    )
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return x


def _like(tensor: Tensor, like: Array) -> Array:
    return tensor if isinstance(like, Tensor) else tensor.cpu().numpy()
