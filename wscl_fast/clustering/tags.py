"""Clusters from a list of tags per sample: TF-IDF, smoothed by which tags occur together, then k-means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wscl_fast.clustering.arrays import MOST_SEED
from wscl_fast.clustering.base import (
    NO_CLUSTER,
    ClusterMethod,
    IdArray,
    as_string_lists,
    check_count,
    check_least,
)
from wscl_fast.clustering.kmeans import KMeans
from wscl_fast.clustering.sparse import SparseRows, truncated_svd

if TYPE_CHECKING:
    from typing_extensions import Self

_RANK = 512  # directions of tag space kept exactly
_TAIL = 128  # random directions that stand for the rest of it
_N_INIT = 4
_MAX_ITER = 50


class TagClusters(ClusterMethod[Sequence[Sequence[str]], IdArray]):
    """Samples with similar tags belong together.

    A sample's row is its TF-IDF over the tags seen in at least `min_count` training samples (scikit-learn's
    smooth idf, rows of length 1). Lists of a few tags seldom overlap, so the rows `X = U Σ Vᵀ` are smoothed
    by which tags occur together, `X V Σ^smoothing`, and clustered by cosine k-means. In short

        X = torch.tensor(TfidfVectorizer(analyzer=set, min_df=min_count).fit_transform(tags).toarray())
        U, s, Vt = torch.linalg.svd(X, full_matrices=False)
        z = KMeans(n_clusters, metric="cosine").fit_predict(X @ Vt.T * s**smoothing)

    X is kept sparse: beyond it, memory is about 650 floats a sample and a tag. With up to 512 tags that is
    exact. With more, the 512 leading directions come from a randomised range finder, and what a row has
    outside them is kept through a random projection to 128 dimensions, so that a sample with rare tags
    only still has a place.

    Samples without a known tag get −1; so do new samples whose tags were all rare or absent in training.

    Sources: Halko, Martinsson & Tropp 2011 (range finder); Dhillon & Modha 2001 (cosine k-means).

    Args:
        n_clusters: K.
        min_count: training samples that a tag must occur in to be known.
        smoothing: 0 for plain TF-IDF; the higher, the more the common themes outweigh single tags.
        seed: of everything random here.

    Attributes:
        tags_: the known tags.
        idf_: float32 [tags].
        n_clusters_: K.
    """

    tags_: list[str]
    idf_: Tensor

    def __init__(
        self, n_clusters: int = 150, *, min_count: int = 2, smoothing: float = 0.5, seed: int = 0
    ) -> None:
        self.n_clusters = check_count(n_clusters, "n_clusters")
        self.min_count = check_count(min_count, "min_count")
        self.smoothing = check_least(smoothing, "smoothing", 0)
        self.seed = check_count(seed, "seed", least=0, most=MOST_SEED)

    def fit(self, info: Sequence[Sequence[str]]) -> Self:
        """Learn the known tags, their weights and the clusters.

        Args:
            info: n lists of tags; order and repetition within a list do not matter.

        Raises:
            TypeError: `info` is not a sequence of lists of strings.
            ValueError: fewer distinct samples with a known tag than `n_clusters`; a `smoothing` so high that
                float32 does not hold its powers.
        """
        self._fit_predict(as_string_lists(info, "info"))
        return self

    def fit_predict(self, info: Sequence[Sequence[str]]) -> IdArray:
        """`fit(info).predict(info)`."""
        return self._fit_predict(as_string_lists(info, "info"))

    def predict(self, info: Sequence[Sequence[str]]) -> IdArray:
        """Cluster id of each sample, int64 [n]; −1 for one without a known tag."""
        self._check_fitted()
        x = self._tfidf(as_string_lists(info, "info"))
        return _without_untagged(x, self._kmeans.predict(x.matmul(self._components)))

    def state_dict(self) -> dict[str, Any]:
        """The known tags, their weights, the smoothing map and the centroids."""
        self._check_fitted()
        return {
            "method": "TagClusters",
            "n_clusters": self.n_clusters,
            "min_count": self.min_count,
            "smoothing": self.smoothing,
            "seed": self.seed,
            "tags": list(self.tags_),
            "idf": self.idf_.numpy().copy(),
            "components": self._components.numpy().copy(),
            "kmeans": self._kmeans.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described."""
        cls._check_state(state)
        names = ("min_count", "smoothing", "seed")
        self = cls(state["n_clusters"], **{name: state[name] for name in names})
        self._set_tags(state["tags"], torch.tensor(np.asarray(state["idf"], dtype=np.float32)))
        self._components = torch.tensor(np.asarray(state["components"], dtype=np.float32))
        self._kmeans = KMeans.from_state_dict(state["kmeans"])
        self.n_clusters_ = self.n_clusters
        return self

    @torch.no_grad()
    def _fit_predict(self, samples: list[list[str]]) -> IdArray:
        counts = Counter(tag for tags in samples for tag in set(tags))
        known = sorted(tag for tag, count in counts.items() if count >= self.min_count)
        frequency = torch.tensor([counts[tag] for tag in known], dtype=torch.float64)
        self._set_tags(known, (torch.log((1 + len(samples)) / (1 + frequency)) + 1).float())
        n_distinct = len({row for row in map(self._codes, samples) if row})
        if n_distinct < self.n_clusters:
            raise ValueError(
                f"n_clusters: expected at most the {n_distinct} distinct samples with a tag that "
                f"{self.min_count} samples have (min_count), got {self.n_clusters}"
            )
        x = self._tfidf(samples)
        self._components = self._smoothing_map(x)
        self._kmeans = KMeans(
            self.n_clusters, metric="cosine", n_init=_N_INIT, max_iter=_MAX_ITER, random_state=self.seed
        )
        ids = self._kmeans.fit_predict(x.matmul(self._components))
        self.n_clusters_ = self.n_clusters
        return _without_untagged(x, ids)

    def _set_tags(self, tags: list[str], idf: Tensor) -> None:
        self.tags_, self.idf_ = tags, idf
        self._code = {tag: code for code, tag in enumerate(tags)}

    def _codes(self, tags: list[str]) -> tuple[int, ...]:
        return tuple(sorted({self._code[tag] for tag in tags if tag in self._code}))

    def _tfidf(self, samples: list[list[str]]) -> SparseRows:
        """One row of length 1 per sample, or of nothing where no tag is known."""
        rows = [self._codes(tags) for tags in samples]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        columns = torch.tensor([code for row in rows for code in row], dtype=torch.int64)
        weights = self.idf_[columns]
        row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        square = torch.zeros(len(rows)).index_add_(0, row_of, weights.square())
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
        return SparseRows(offsets, columns, weights / square[row_of].sqrt(), len(self.tags_))

    def _smoothing_map(self, x: SparseRows) -> Tensor:
        """The map from a TF-IDF row to what k-means sees, float32 [tags, dimensions]."""
        generator = torch.Generator().manual_seed(self.seed)
        values, directions = truncated_svd(x, _RANK, generator)
        weights = values.pow(self.smoothing)
        if bool(weights.isinf().any()):
            most = math.log(torch.finfo(weights.dtype).max) / math.log(float(values.max()))
            raise ValueError(f"smoothing: expected at most {most:.0f} for these tags, got {self.smoothing:g}")
        components = directions * weights
        if min(x.shape) <= _RANK:
            return components
        tail = torch.randn(x.n_columns, _TAIL, generator=generator) / math.sqrt(_TAIL)
        tail -= directions @ (directions.T @ tail)
        return torch.cat([components, tail * weights[-1]], dim=1)


def _without_untagged(x: SparseRows, ids: Tensor) -> IdArray:
    return torch.where(x.lengths > 0, ids, NO_CLUSTER).numpy()
