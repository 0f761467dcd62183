"""Clusters that come anew every few epochs of training, under ids that stay."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wscl_fast.clustering.base import NO_CLUSTER, check_count, check_mapping
from wscl_fast.clustering.bounds import cluster_sums
from wscl_fast.clustering.diagnostics import diagnose, entropy
from wscl_fast.clustering.kmeans import KMeans
from wscl_fast.clustering.matching import match_clusters
from wscl_fast.clustering.points import Frame, Points, Ranks, check_metric
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional._checks import check_bool


class Level(NamedTuple):
    """One clustering of all samples, and how it differs from the one before."""

    clusters: Tensor  # int64 [samples], −1 for a sample that no rank gave
    centroids: Tensor  # [K, d]
    inertia: float
    n_iter: int
    moved: float | None  # share of samples in another cluster than last time; None the first time
    nmi: float | None  # normalised mutual information with last time, 0 to 1


class ClusterScheduler:
    """Clusters the features every few epochs, for one or several K, and keeps the ids from epoch to epoch.

    In a training loop::

        scheduler = ClusterScheduler((256, 1024), every=2, warmup=5)
        for epoch in range(epochs):
            if scheduler.due(epoch):
                coarse, fine = scheduler.step(momentum_features(), targets=[queue, sampler])

    A later clustering starts from the means of the new features over the old clusters, so that a cluster
    keeps its id while the features turn; what changed places all the same is renamed so that as many samples
    as can be keep their id (`match_clusters`).

    Sources: Caron et al., *Deep Clustering*, ECCV 2018 (cluster, train, repeat); Li et al., *Prototypical
    Contrastive Learning*, ICLR 2021 (momentum features, several K, warm-up); Guo et al., *HCSC*, CVPR 2022
    (nested levels: clusters of clusters).

    Args:
        n_clusters: K, or one K a level.
        every: epochs between two clusterings.
        warmup: the first epoch with clusters.
        metric: "cosine" or "euclidean".
        nested: level l + 1 clusters the centroids of level l, weighted by their samples: the numbers fall.
        carry_bounds: keep the last features, and let the last clustering's bounds spare distances; pays
            where features move little. Costs as much memory as the features.
        sharded: each rank of `group` steps with the features of its own samples; the work is shared.
        group: a process group; by default all processes.
        parameters: more of :class:`KMeans`, such as `init`, `max_iter` or `random_state`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Attributes:
        models: the k-means of each level.
        clusters_: int64 [levels, samples], the ids of the last step.
    """

    clusters_: Tensor

    def __init__(
        self,
        n_clusters: int | Sequence[int],
        *,
        every: int = 1,
        warmup: int = 0,
        metric: str = "cosine",
        nested: bool = False,
        carry_bounds: bool = False,
        sharded: bool = False,
        group: Group = None,
        **parameters: Any,
    ) -> None:
        for name, flag in (("nested", nested), ("carry_bounds", carry_bounds), ("sharded", sharded)):
            check_bool(name, flag)
        many = list(n_clusters) if isinstance(n_clusters, Iterable) else [n_clusters]
        self.n_clusters = [check_count(k, "n_clusters") for k in many]
        if not many:
            raise ValueError("n_clusters: expected at least one number of clusters, got none")
        if nested and any(a <= b for a, b in itertools.pairwise(many)):
            raise ValueError(f"n_clusters: expected falling numbers for nested levels, got {many}")
        self.every, self.warmup = check_count(every, "every"), check_count(warmup, "warmup", least=0)
        self.metric, self.nested, self.carry_bounds = check_metric(metric), nested, carry_bounds
        self.ranks = Ranks(sharded, group)
        free = inspect.signature(KMeans).parameters.keys() - {"n_clusters", "metric", "warm_start"}
        for name in parameters:
            if name not in free:
                raise TypeError(f"parameters: expected ones of {', '.join(sorted(free))}, got {name}")
        self.models = [
            KMeans(k, metric=metric, warm_start=True, **{**parameters, **self._sharing(level)})
            for level, k in enumerate(self.n_clusters)
        ]
        self._last: tuple[Tensor, Tensor] | None = None  # copies of the last step's features and samples

    def due(self, epoch: int) -> bool:
        """Whether the samples are clustered before `epoch`.

        Args:
            epoch: 0 or more.
        """
        check_count(epoch, "epoch", least=0)
        return epoch >= self.warmup and (epoch - self.warmup) % self.every == 0

    @torch.no_grad()
    def step(
        self,
        features: Tensor,
        samples: Tensor | None = None,
        *,
        n_samples: int | None = None,
        targets: Sequence[Any] = (),
        level: int = -1,
    ) -> list[Level]:
        """Cluster the features, and tell the new ids to `targets`.

        Args:
            features: this rank's [n, d], of a momentum encoder best.
            samples: int64 [n], which samples these are, each once; by default 0 … n − 1. Ranks may have the
                same ones, as samplers give them that fill up a last batch.
            n_samples: of all ranks; by default one more than the largest of `samples`.
            targets: what has a `refresh(clusters_of_samples)`: a :class:`wscl_fast.ClusterQueue`, a sampler.
            level: whose ids the targets get; by default the last one's.

        Returns:
            One clustering a level, the same on every rank.

        Raises:
            TypeError: features or samples that are no tensors, or `targets` that cannot be told.
            ValueError: `samples` do not fit the features or `n_samples`, no such `level`, no features on any
                rank, other columns than in the last step, or as :meth:`KMeans.fit` does. If sharded, an
                error on one rank alone (not one about what ranks disagree in) leaves the others waiting.
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor, got {type(features).__name__}")
        if features.ndim != 2:
            raise ValueError(f"features: expected a matrix [n, d], got shape {tuple(features.shape)}")
        # Before the clustering: what it found would be lost.
        level = check_count(level, "level", least=-len(self.models), most=len(self.models) - 1)
        targets = _check_targets(targets)
        if samples is None:
            if self.ranks.size > 1:
                raise ValueError("samples: expected the samples that the features of this rank belong to")
            samples = torch.arange(len(features), device=features.device)
        if not isinstance(samples, Tensor):
            raise TypeError(f"samples: expected a tensor, got {type(samples).__name__}")
        if samples.shape != features.shape[:1] or samples.dtype != torch.int64:
            raise ValueError(
                f"samples: expected int64 [{len(features)}] as features, "
                f"got {samples.dtype} {list(samples.shape)}"
            )
        everyone = self.ranks.gather(samples)
        if not len(everyone):
            raise ValueError("features: expected at least one sample, got none")
        size = int(everyone.max()) + 1 if n_samples is None else check_count(n_samples, "n_samples")
        if int(everyone.max()) >= size or int(everyone.min()) < 0:
            raise ValueError(f"samples: expected numbers from 0 to n_samples − 1 = {size - 1}")
        again = torch.tensor(len(samples) - len(torch.unique(samples)), device=features.device)
        if int(self.ranks.sum(again)):
            raise ValueError("samples: expected each sample once on a rank, got one several times")
        drift = self._drift(features, samples)
        levels: list[Level] = []
        with _all_or_none(self.models):
            for number, model in enumerate(self.models):
                if hasattr(self, "clusters_"):
                    self._turn(model, number, features, samples)
                if self.nested and number:
                    ids = self._coarser(model, levels[-1])
                else:
                    ids = torch.full((size,), NO_CLUSTER, device=features.device)
                    ids[everyone] = self.ranks.gather(model.fit(features, drift=drift).labels_)
                levels.append(self._named(model, number, ids))
        if self.carry_bounds:
            self._last = features.detach().clone(), samples.clone()
        self.clusters_ = torch.stack([found.clusters for found in levels])
        for target in targets:
            target.refresh(levels[level].clusters)
        return levels

    def state_dict(self) -> dict[str, Any]:
        """Copies of the ids and centroids to go on with; empty before the first step."""
        if not hasattr(self, "clusters_"):
            return {}
        return {
            "clusters": self.clusters_.clone(),
            "centroids": [torch.as_tensor(model.cluster_centers_).clone() for model in self.models],
            "frames": [vars(model._frame).copy() for model in self.models],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: with its ids and its centroids, by which `models` predict.

        Args:
            state: what `state_dict` gave.

        Raises:
            TypeError: `state` is no mapping.
            ValueError: a missing entry, or other numbers of clusters.
        """
        check_mapping(state, "state")
        for name in ("clusters", "centroids"):
            if state and name not in state:
                raise ValueError(f"state: expected an entry {name!r}, got none")
        sizes = [len(centroids) for centroids in state["centroids"]] if state else self.n_clusters
        if sizes != self.n_clusters:
            raise ValueError(f"state: expected clusters {self.n_clusters}, got {sizes}")
        # What the models found so far, and the features of the last step, are of another course.
        self.models = [KMeans(**model.get_params()) for model in self.models]
        self._last = None
        self.__dict__.pop("clusters_", None)
        if not state:
            return
        self.clusters_ = state["clusters"].clone()
        frames = state.get("frames", [{}] * len(sizes))  # older states have none
        for model, centroids, frame in zip(self.models, state["centroids"], frames, strict=True):
            model._take_centroids(centroids.clone(), Frame(**frame))

    def _sharing(self, level: int) -> dict[str, Any]:
        # Centroids are on every rank: upper levels are the same everywhere without a word.
        shared = self.ranks.sharded and not (self.nested and level)
        if not shared:
            return {"sharded": False, "group": None, "shard_centroids": False}
        return {"sharded": True, "group": self.ranks.group}

    def _turn(self, model: KMeans, level: int, features: Tensor, samples: Tensor) -> None:
        """Let the model start from the means of the features over the last ids."""
        known = samples < self.clusters_.shape[1]
        ids = self.clusters_[level].to(features.device)[samples.where(known, 0)].where(known, NO_CLUSTER)
        if not bool((known := ids >= 0).all()):
            features, ids = features[known], ids[known]
        points = Points(features, metric=self.metric, ranks=self.ranks)
        if points.dim != model.n_features_in_:
            width = model.n_features_in_
            raise ValueError(f"features: expected {width} columns as in the last step, got {points.dim}")
        k = model.n_clusters
        sums = self.ranks.sum(cluster_sums(points, ids, k))
        counts = self.ranks.sum(torch.bincount(ids, minlength=k))[:, None]
        old = torch.as_tensor(model.cluster_centers_).to(sums)
        usable = (counts > 0) & (sums != 0).any(dim=1, keepdim=True)
        model.cluster_centers_ = torch.where(usable, sums / counts.clamp(min=1), old).to(points.dtype)

    def _coarser(self, model: KMeans, finer: Level) -> Tensor:
        """Ids out of clusters of the finer level's centroids."""
        weights = torch.bincount(finer.clusters[finer.clusters >= 0], minlength=len(finer.centroids))
        model.fit(finer.centroids, sample_weight=weights.double())
        labels: Tensor = model.labels_
        known = finer.clusters >= 0
        return labels[finer.clusters.clamp(min=0)].where(known, NO_CLUSTER)

    def _named(self, model: KMeans, level: int, ids: Tensor) -> Level:
        """The clustering under the ids that keep most samples where they were."""
        moved, nmi = None, None
        if hasattr(self, "clusters_"):
            n = min(len(ids), self.clusters_.shape[1])
            old = self.clusters_[level, :n].to(ids.device)
            names = match_clusters(old, ids[:n], model.n_clusters)
            if not torch.equal(names, torch.arange(len(names), device=names.device)):
                model.rename(names)
                ids = names[ids.clamp(min=0)].where(ids >= 0, NO_CLUSTER)
            both = (old >= 0) & (ids[:n] >= 0)
            moved = float((old != ids[:n])[both].double().mean()) if bool(both.any()) else None
            nmi = normalised_information(old, ids[:n]) if bool(both.any()) else None
        return Level(ids, model.cluster_centers_, model.inertia_, model.n_iter_, moved, nmi)

    def _drift(self, features: Tensor, samples: Tensor) -> Tensor | None:
        """How far each sample moved since the last step, where that is known."""
        if self._last is None:
            return None
        last, before = self._last
        # Every rank decides alike: the fit that follows is a joint one.
        same = torch.tensor(int(torch.equal(before, samples) and last.shape == features.shape))
        if int(self.ranks.sum(1 - same.to(features.device))):
            return None
        here, there = (Points(x, metric=self.metric) for x in (features, last))
        drift = torch.empty(len(features), dtype=here.dtype, device=features.device)
        for (rows, x), (_, y) in zip(here.parts(), there.parts(), strict=True):
            drift[rows] = (here.directions(x) - here.directions(y)).norm(dim=1)
        return drift * (1 + 2.0**-14) + 2.0**-20


@contextmanager
def _all_or_none(models: Sequence[KMeans]) -> Iterator[None]:
    """What the models were before comes back where the block fails: features may be refused at any level."""
    before = [vars(model).copy() for model in models]
    try:
        yield
    except BaseException:
        for model, attributes in zip(models, before, strict=True):
            vars(model).clear()
            vars(model).update(attributes)
        raise


def _check_targets(targets: object) -> list[Any]:
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets: expected a sequence of targets, got {type(targets).__name__}")
    told = list(targets)
    for number, target in enumerate(told):
        if not callable(getattr(target, "refresh", None)):
            raise TypeError(f"targets[{number}]: expected a `refresh`, got {type(target).__name__}")
    return told


def normalised_information(old: Tensor, new: Tensor) -> float:
    """Normalised mutual information of two clusterings, `2 I / (H + H')`, over samples that have both ids.

    Equals `sklearn.metrics.normalized_mutual_info_score(old, new)`; 1 where both say nothing.
    """
    report = diagnose(new, old)
    both = (old >= 0) & (new >= 0)
    size = torch.bincount(new[both]).cpu().numpy()
    total = entropy(size) + (report.label_entropy or 0.0)
    return 1.0 if total == 0 else 2 * (report.mutual_information or 0.0) / total
