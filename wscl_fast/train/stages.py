"""Stage 1 inside the trainer: from what a data set knows about its images to one cluster id per sample."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wscl_fast.clustering import (
    NO_CLUSTER,
    AttributeClusters,
    ClusterReport,
    ClusterScheduler,
    HierarchyClusters,
    IdClusters,
    TagClusters,
    diagnose,
)
from wscl_fast.data import ImageDataset
from wscl_fast.train.config import ClusterConfig, Config, KMeansConfig, TagsConfig

Ids = npt.NDArray[np.int64]
log = logging.getLogger(__name__)

_MAX_ITER = 50  # of k-means: assignments that change later hardly matter to the loss

TITLES = {
    "random": "random encoder",
    "pixels": "pixels",
    "none": "InfoNCE, no auxiliary information",
    "tags": "Cl-InfoNCE, hashtags",
    "attributes": "Cl-InfoNCE, attributes",
    "hierarchy": "Cl-InfoNCE, hierarchy",
    "ids": "Cl-InfoNCE, given clusters",
    "kmeans": "Cl-InfoNCE, k-means clusters",
    "labels": "SupCon, labels (the ceiling)",
}


@dataclass(frozen=True)
class Clustering:
    """Cluster ids of every sample of a data set, and what assigned them."""

    method: str
    ids: Ids  # int64 [n], −1 where nothing is known
    state: dict[str, Any]  # state_dict of the fitted estimator; empty where nothing was fitted
    coarser: Ids | None = None  # int64 [levels, n]: ids above these, from the root down
    moved: float | None = None  # share of training samples in another cluster than in the clustering before
    nmi: float | None = None  # normalised mutual information with it


COLUMNS = {
    "tags": "tag_column",
    "attributes": "attribute_columns",
    "hierarchy": "hierarchy_columns",
    "ids": "cluster_column",
}
FITTED_ON = {  # the field of a data set; methods that are not listed look at nothing but the images
    "tags": "tags",
    "attributes": "attributes",
    "hierarchy": "hierarchy",
    "ids": "clusters",
    "labels": "labels",
}


def auxiliary_methods(dataset: ImageDataset) -> list[str]:
    """The methods for which the data set has auxiliary information, the most telling kind first."""
    has = {
        "tags": dataset.tags is not None,
        "attributes": bool(dataset.attributes),
        "hierarchy": dataset.hierarchy is not None,
        "ids": dataset.clusters is not None,
    }
    return [method for method, there in has.items() if there]


def resolve_method(config: ClusterConfig, dataset: ImageDataset) -> str:
    """The method that `cluster.method` stands for on this data set.

    Raises:
        ValueError: the data set lacks what the method needs.
    """
    offered = [*auxiliary_methods(dataset), "kmeans", "none"]
    if config.method == "auto":
        return offered[0]
    if config.method in COLUMNS and config.method not in offered:
        raise ValueError(
            f"cluster.method '{config.method}' needs data.{COLUMNS[config.method]}; "
            f"'{dataset.name}' offers {', '.join(offered)}"
        )
    if config.method == "labels":
        label_columns(config, dataset)
    return config.method


def resolve_training(config: Config, dataset: ImageDataset) -> str:
    """The method that a run trains by, `resolve_method`'s.

    Raises:
        ValueError: the data set lacks what the method needs; too few epochs for a first k-means.
    """
    method = resolve_method(config.cluster, dataset)
    warmup = config.cluster.kmeans.warmup_epochs
    if method == "kmeans" and config.train.epochs <= warmup:
        raise ValueError(
            f"cluster.kmeans.warmup_epochs must be below train.epochs ({config.train.epochs}) for k-means to "
            f"run, got {warmup}"
        )
    return method


def data_digest(dataset: ImageDataset, method: str, *more: str) -> str:
    """What a run by `method` depends on of the data set's table, and `more` fields of it, as a digest."""
    return dataset.digest(*([FITTED_ON[method]] if method in FITTED_ON else []), *more)


def label_columns(config: ClusterConfig, dataset: ImageDataset) -> tuple[str, ...]:
    """The label columns that method `labels` uses, the coarsest first."""
    columns = config.labels.columns or tuple(dataset.labels)[:1]
    if not columns:
        raise ValueError(f"cluster.method 'labels' needs data.label_columns; '{dataset.name}' has no labels")
    for column in columns:
        if column not in dataset.labels:
            raise ValueError(
                f"cluster.labels.columns: '{column}' is no label of '{dataset.name}': "
                f"choose from {', '.join(dataset.labels) or 'none'}"
            )
    return columns


def fit_clusters(
    config: ClusterConfig,
    dataset: ImageDataset,
    method: str,
    *,
    features: npt.NDArray[np.float32] | None = None,
    seed: int = 0,
    previous: Clustering | None = None,
) -> Clustering:
    """Fit `method` on the training split and assign every sample of the data set.

    Args:
        config: settings of the methods.
        dataset: samples with their auxiliary information.
        method: a resolved method (`resolve_method`).
        features: float32 [n, d], for method `kmeans` alone.
        seed: of the random starts.
        previous: the clustering so far, from which `kmeans` goes on where `kmeans.stable_ids` says so.

    Raises:
        ValueError: `kmeans` without features; a setting that the training split cannot follow.
    """
    if method == "none":
        return Clustering(method, np.arange(len(dataset.keys)), {})
    if method == "labels":
        levels = [dataset.labels[column].astype(np.int64) for column in label_columns(config, dataset)]
        return Clustering(method, levels[-1], {}, np.stack(levels[:-1]) if levels[:-1] else None)
    train = dataset.indices("train")
    estimator: Any
    if method == "tags":
        assert dataset.tags is not None
        samples = [dataset.tags[i] for i in train]
        clusters = _at_most_distinct(config.tags, samples)
        estimator = TagClusters(clusters, min_count=config.tags.min_count, seed=seed).fit(samples)
        ids = estimator.predict(dataset.tags)
    elif method == "attributes":
        assert dataset.attributes is not None
        top_k, found = config.attributes.top_k, len(dataset.attributes)
        if top_k is not None and top_k > found:
            raise ValueError(
                f"cluster.attributes.top_k must be at most {found}, the attributes of '{dataset.name}', got "
                f"{top_k}"
            )
        estimator = AttributeClusters(top_k=top_k)
        estimator.fit({name: values[train] for name, values in dataset.attributes.items()})
        ids = estimator.predict(dataset.attributes)
    elif method == "hierarchy":
        assert dataset.hierarchy is not None
        paths = [dataset.hierarchy[i] for i in train]
        if not any(paths):
            raise _knows_none(method, "a path", len(train))
        estimator = HierarchyClusters(level=config.hierarchy.level).fit(paths)
        ids = estimator.predict(dataset.hierarchy)
    elif method == "ids":
        assert dataset.clusters is not None
        given = dataset.clusters[train].tolist()
        if all(value == NO_CLUSTER for value in given):
            raise _knows_none(method, "a cluster", len(train))
        estimator = IdClusters().fit(given)
        ids = estimator.predict(dataset.clusters.tolist())
    elif method == "kmeans":
        if features is None:
            raise ValueError("method 'kmeans' clusters features: none were given")
        return _kmeans(config.kmeans, features, train, seed, previous)
    else:
        raise ValueError(f"unknown clustering method '{method}'")
    return Clustering(method, np.asarray(ids, dtype=np.int64), estimator.state_dict())


def _knows_none(method: str, what: str, count: int) -> ValueError:
    """That a column of the table says nothing of the training split, in which clusters are found."""
    return ValueError(
        f"data.{COLUMNS[method]}: none of the {count} training samples has {what} there; name another column "
        "or choose another cluster.method"
    )


def _kmeans(
    config: KMeansConfig,
    features: npt.NDArray[np.float32],
    train: npt.NDArray[np.int64],
    seed: int,
    previous: Clustering | None,
) -> Clustering:
    """Clusters of the training split's features, under the previous ids where they are to stay."""
    directed = len(train) if config.metric == "euclidean" else int(features[train].any(axis=1).sum())
    if not directed:
        raise ValueError(
            f"cluster.kmeans.metric '{config.metric}' needs directions: the features of all {len(train)} "
            "training samples are zero; lower optim.lr or choose 'euclidean'"
        )
    clusters = min(config.n_clusters, directed)
    scheduler = ClusterScheduler(clusters, metric=config.metric, max_iter=_MAX_ITER, random_state=seed)
    if config.stable_ids and previous is not None and previous.method == "kmeans":
        centroids = torch.from_numpy(previous.state["centroids"])
        if len(centroids) == clusters:
            scheduler.load_state_dict(
                {"clusters": torch.from_numpy(previous.ids[train])[None], "centroids": [centroids]}
            )
    (found,) = scheduler.step(torch.from_numpy(features[train]))
    model = scheduler.models[0]
    ids = model.predict(features)
    return Clustering("kmeans", ids, model.state_dict(), moved=found.moved, nmi=found.nmi)


def _at_most_distinct(config: TagsConfig, samples: Sequence[Sequence[str]]) -> int:
    """`n_clusters`, or the number of different tag lists where a small data set has fewer.

    Raises:
        ValueError: no tag is known.
    """
    counts = Counter(tag for tags in samples for tag in set(tags))
    distinct = {frozenset(tag for tag in tags if counts[tag] >= config.min_count) for tags in samples}
    found = len(distinct - {frozenset()})
    if not found:
        raise ValueError(
            f"cluster.tags.min_count is {config.min_count}: no tag has that many of the {len(samples)} "
            "training samples; lower it or choose another cluster.method"
        )
    if found < config.n_clusters:
        log.info("%d different tag lists: %d clusters instead of %d", found, found, config.n_clusters)
        return found
    return config.n_clusters


def training_ids(clustering: Clustering, dataset: ImageDataset) -> Ids:
    """Ids of the training split for the loss, [n, levels], the coarsest level first.

    A sample without a cluster becomes one of its own, and learns as in InfoNCE: its own views are its
    positives.
    """
    levels = [*([] if clustering.coarser is None else clustering.coarser), clustering.ids]
    train = dataset.indices("train")
    return np.stack([_alone_without_cluster(ids[train]) for ids in levels], axis=1)


def _alone_without_cluster(ids: Ids) -> Ids:
    ids = ids.copy()
    unknown = np.flatnonzero(ids < 0)
    ids[unknown] = ids.max(initial=-1) + 1 + np.arange(len(unknown))
    return ids


def diagnose_training(
    clustering: Clustering, dataset: ImageDataset, label: str | None = None
) -> ClusterReport:
    """Sizes, H(Z) and, with a label column, I(Z;T) and H(Z|T) on the training split."""
    train = dataset.indices("train")
    labels = dataset.labels[label][train] if label is not None else None
    return diagnose(clustering.ids[train], labels)


def is_due(config: ClusterConfig, method: str, epoch: int) -> bool:
    """Whether the clusters are (re)made before `epoch`: k-means comes back, the others come once."""
    if epoch == 0:
        return True
    since = epoch - config.kmeans.warmup_epochs
    return method == "kmeans" and since >= 0 and since % config.kmeans.every == 0


def clusters_for_epoch(
    config: ClusterConfig,
    dataset: ImageDataset,
    method: str,
    epoch: int,
    *,
    features: Callable[[], npt.NDArray[np.float32]],
    seed: int,
    previous: Clustering | None = None,
) -> Clustering:
    """The clusters that hold from `epoch` on; `features` is called when k-means needs them."""
    if method != "kmeans":
        return fit_clusters(config, dataset, method, seed=seed)
    if epoch < config.kmeans.warmup_epochs:
        return fit_clusters(config, dataset, "none")
    return fit_clusters(config, dataset, method, features=features(), seed=seed, previous=previous)
