"""Stage 1 in the trainer: which method `auto` picks, what each gives, and when k-means comes back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from wscl_fast.data import ImageDataset
from wscl_fast.train.config import ClusterConfig, Config, KMeansConfig, LabelsConfig, TagsConfig, replace
from wscl_fast.train.stages import (
    clusters_for_epoch,
    data_digest,
    diagnose_training,
    fit_clusters,
    is_due,
    resolve_method,
    resolve_training,
    training_ids,
)

N = 12
SPLIT = np.array(["train"] * 8 + ["test"] * 4)


def dataset(**more: Any) -> ImageDataset:
    """Twelve images of two kinds, with nothing known but what is given."""
    kinds = np.arange(N) % 2
    return ImageDataset(
        name="tiny",
        images=np.zeros((N, 3, 8, 8), dtype=np.uint8),
        keys=[str(i) for i in range(N)],
        split=SPLIT,
        labels={"kind": kinds},
        label_names={"kind": ["a", "b"]},
        **more,
    )


TAGS = [("cat", "pet") if i % 2 else ("car", "road") for i in range(N - 1)] + [("zebra",)]
FULL = dataset(
    tags=TAGS,
    attributes={"tone": np.array(["light", "dark"] * 6), "form": np.array(["round"] * 6 + ["flat"] * 6)},
    hierarchy=[("root", "x", str(i)) if i % 2 else ("root", "y") for i in range(N)],
    clusters=np.array(["u", "v", "w"] * 4),
)


def test_auto_takes_what_the_data_has() -> None:
    auto = ClusterConfig()
    order = ["tags", "attributes", "hierarchy", "clusters"]
    for dropped, method in enumerate(["tags", "attributes", "hierarchy", "ids", "kmeans"]):
        left = dataclasses.replace(FULL, **dict.fromkeys(order[:dropped]))
        assert resolve_method(auto, left) == method


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClusterConfig(method="tags"), "'tags' needs data.tag_column; 'tiny' offers kmeans, none"),
        (ClusterConfig(method="attributes"), "needs data.attribute_columns"),
        (ClusterConfig(method="hierarchy"), "needs data.hierarchy_columns"),
        (ClusterConfig(method="ids"), "needs data.cluster_column"),
        (
            ClusterConfig(method="labels", labels=LabelsConfig(("kind", "kinf"))),
            "'kinf' is no label of 'tiny': choose from kind",
        ),
    ],
)
def test_what_the_data_lacks_is_named(config: ClusterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=r"cluster\.") as caught:
        resolve_method(config, dataset())
    assert message in str(caught.value)


def test_labels_without_labels() -> None:
    bare = dataclasses.replace(dataset(), labels={}, label_names={})
    with pytest.raises(ValueError, match=r"needs data\.label_columns"):
        resolve_method(ClusterConfig(method="labels"), bare)


def test_kmeans_that_would_never_run_is_refused() -> None:
    config = replace(Config(), **{"train.epochs": 5, "cluster.kmeans.warmup_epochs": 5})
    with pytest.raises(ValueError, match=r"warmup_epochs must be below train\.epochs \(5\).*, got 5"):
        resolve_training(config, dataset())
    assert resolve_training(replace(config, **{"train.epochs": 6}), dataset()) == "kmeans"
    assert resolve_training(config, FULL) == "tags"


def test_the_digest_is_of_what_a_method_looks_at() -> None:
    fewer = dataset(tags=[*TAGS[:-1], ("cat",)])
    before = dataset(tags=TAGS)
    assert data_digest(before, "none") == data_digest(fewer, "none") == before.digest()
    assert data_digest(before, "tags") != data_digest(fewer, "tags")
    assert data_digest(before, "tags") == data_digest(FULL, "tags")
    assert (
        len({data_digest(FULL, m) for m in ("none", "tags", "attributes", "hierarchy", "ids", "labels")}) == 6
    )
    turned = dataclasses.replace(before, keys=before.keys[::-1])
    resplit = dataclasses.replace(before, split=SPLIT[::-1])
    assert len({data.digest() for data in (before, turned, resplit)}) == 3


EXPECTED = {"none": 8, "tags": 2, "attributes": 4, "hierarchy": 2, "ids": 3, "labels": 2}


@pytest.mark.parametrize(("method", "clusters"), list(EXPECTED.items()))
def test_each_method_clusters_the_training_split(method: str, clusters: int) -> None:
    config = ClusterConfig(tags=TagsConfig(n_clusters=2, min_count=1))
    config = replace(Config(cluster=config), **{"cluster.hierarchy.level": 2}).cluster
    fitted = fit_clusters(config, FULL, method)
    assert fitted.ids.shape == (N,)
    assert fitted.ids.dtype == np.int64
    assert len(np.unique(fitted.ids[:8])) == clusters
    report = diagnose_training(fitted, FULL, "kind")
    assert report.n_clusters == clusters
    assert (report.mutual_information == pytest.approx(1.0)) is (method != "ids")  # ids cut across the kinds


@pytest.mark.parametrize(
    ("method", "known", "message"),
    [
        (
            "hierarchy",
            {"hierarchy": [()] * 8 + [("animal",)] * (N - 8)},
            "data.hierarchy_columns: none of th",
        ),
        ("ids", {"clusters": np.array([-1] * 8 + [0] * (N - 8))}, "data.cluster_column: none of the 8 train"),
        ("attributes", {}, "cluster.attributes.top_k must be at most 2, the attributes of 'tiny', got 3"),
    ],
)
def test_what_the_training_split_cannot_follow_is_named(
    method: str, known: dict[str, Any], message: str
) -> None:
    config = replace(Config(), **{"cluster.attributes.top_k": 3}).cluster
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fit_clusters(config, dataclasses.replace(FULL, **known), method)


def test_fitted_on_the_training_split_alone() -> None:
    """A tag and a joint value that only a test image has are unknown, not clusters of their own."""
    config = ClusterConfig(tags=TagsConfig(n_clusters=2, min_count=1))
    assert fit_clusters(config, FULL, "tags").ids[-1] == -1
    tones = np.array(["light", "dark"] * 5 + ["never", "dark"])
    strange = dataclasses.replace(FULL, attributes={"tone": tones})
    assert fit_clusters(config, strange, "attributes").ids[-2:].tolist() == [-1, fit_clusters(
        config, strange, "attributes").ids[1]]  # fmt: skip


def test_tags_that_none_shares_are_named() -> None:
    data = dataclasses.replace(FULL, tags=[(str(i),) for i in range(N)])
    with pytest.raises(ValueError, match=r"cluster\.tags\.min_count is 2: no tag has that many of the 8 "):
        fit_clusters(ClusterConfig(), data, "tags")


def test_samples_without_a_cluster_become_their_own() -> None:
    tags = [(), ("cat",), ("cat",), (), *TAGS[4:]]
    data = dataclasses.replace(FULL, tags=tags)
    fitted = fit_clusters(ClusterConfig(tags=TagsConfig(n_clusters=3, min_count=1)), data, "tags")
    assert (fitted.ids[[0, 3]] == -1).all()
    ids = training_ids(fitted, data)
    assert ids.shape == (8, 1)
    ids = ids[:, 0]
    assert (ids >= 0).all()
    assert ids[0] != ids[3]
    assert not set(ids[[0, 3]]) & set(ids[[1, 2, 4, 5, 6, 7]])


def test_several_label_columns_are_levels_of_clusters() -> None:
    kinds, breeds = np.arange(N) % 2, np.array([-1, *np.arange(N - 1) % 4])
    names = {"kind": ["a", "b"], "breed": list("pqrs")}
    data = dataclasses.replace(FULL, labels={"kind": kinds, "breed": breeds}, label_names=names)
    fitted = fit_clusters(ClusterConfig(labels=LabelsConfig(("kind", "breed"))), data, "labels")
    assert np.array_equal(fitted.ids, breeds)
    ids = training_ids(fitted, data)
    assert ids[:, 0].tolist() == kinds[:8].tolist()
    assert ids[1:, 1].tolist() == breeds[1:8].tolist()
    assert ids[0, 1] not in ids[1:, 1]
    first = training_ids(fit_clusters(ClusterConfig(), data, "labels"), data)
    assert np.array_equal(first, kinds[:8, None])


def test_kmeans_comes_back_and_starts_late() -> None:
    config = ClusterConfig(kmeans=KMeansConfig(n_clusters=2, warmup_epochs=2, every=3))
    assert [e for e in range(10) if is_due(config, "kmeans", e)] == [0, 2, 5, 8]
    assert [e for e in range(10) if is_due(config, "tags", e)] == [0]

    features = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    features[::2] += 9
    features[1::2] -= 9
    asked = []

    def give() -> Any:
        asked.append(1)
        return features

    early = clusters_for_epoch(config, FULL, "kmeans", 0, features=give, seed=0)
    assert early.method == "none"
    assert not asked
    late = clusters_for_epoch(config, FULL, "kmeans", 2, features=give, seed=0)
    assert (late.ids[::2] == late.ids[0]).all()
    assert (late.ids[1::2] == 1 - late.ids[0]).all()
    assert late.state
    assert (late.moved, late.nmi) == (None, None)
    features = -features  # the clusters are the same, and so are their ids
    later = clusters_for_epoch(config, FULL, "kmeans", 5, features=give, seed=1, previous=late)
    assert np.array_equal(later.ids, late.ids)
    assert (later.moved, later.nmi) == (0, 1)
    anew = replace(config, **{"kmeans.stable_ids": False})
    assert clusters_for_epoch(anew, FULL, "kmeans", 5, features=give, seed=1, previous=late).moved is None
    many = ClusterConfig(kmeans=KMeansConfig(n_clusters=500))
    assert len(np.unique(fit_clusters(many, FULL, "kmeans", features=features).ids[:8])) == 8
    partly = np.where(np.arange(N)[:, None] < 3, 0, features)  # three samples without a direction
    fewer = fit_clusters(many, FULL, "kmeans", features=partly)
    assert len(fewer.state["centroids"]) == 5
    assert fit_clusters(many, FULL, "kmeans", features=features, previous=fewer).moved is None
    with pytest.raises(ValueError, match="'cosine' needs directions: the features of all 8 training samples"):
        fit_clusters(many, FULL, "kmeans", features=np.zeros_like(features))
    with pytest.raises(ValueError, match="features"):
        fit_clusters(config, FULL, "kmeans")
    with pytest.raises(ValueError, match="unknown clustering method"):
        fit_clusters(config, FULL, "magic")
