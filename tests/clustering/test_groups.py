"""Clusters that need no iteration: given ids, attributes, a hierarchy; and the authors' published ids."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from wscl_fast.clustering import (
    AttributeClusters,
    HierarchyClusters,
    IdClusters,
    KMeans,
    diagnose,
    method_from_state_dict,
)

METADATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state, default=lambda array: array.tolist()))


# --- given ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_ids_are_numbered_in_sorted_order(kind):
    ids = IdClusters().fit_predict(kind([30, 10, 20, 10]))
    assert ids.dtype == np.int64
    assert ids.tolist() == [2, 0, 1, 0]


def test_ids_unseen_or_missing_have_no_cluster():
    model = IdClusters().fit(["b", "a", None, "b"])
    assert model.n_clusters_ == 2
    assert model.predict(["a", "b", "c", None]).tolist() == [0, 1, -1, -1]
    assert IdClusters().fit_predict([-1, 7, 7, 3]).tolist() == [-1, 1, 1, 0]


def test_ids_of_several_types_do_not_mix():
    assert IdClusters().fit_predict(["1", 1, 1.5, "1", None]).tolist() == [2, 0, 1, 2, -1]


def test_ids_do_not_depend_on_the_order_of_samples():
    ids = np.random.default_rng(0).integers(0, 50, 200)
    order = np.random.default_rng(1).permutation(200)
    assert np.array_equal(IdClusters().fit_predict(ids[order]), IdClusters().fit_predict(ids)[order])


# --- attributes ---------------------------------------------------------------------------------------

INFO = {
    "constant": ["x"] * 8,
    "coin": [0, 0, 0, 0, 1, 1, 1, 1],
    "rare": [0, 0, 0, 0, 0, 0, 0, 1],
    "quarter": ["a", "b", "c", "d"] * 2,
}


def test_attributes_of_highest_entropy_are_joined():
    model = AttributeClusters(top_k=2).fit(INFO)
    assert model.columns_ == ["quarter", "coin"]
    assert model.entropies_["constant"] == 0
    assert model.entropies_["coin"] == pytest.approx(1)
    assert model.entropies_["quarter"] == pytest.approx(2)
    assert model.entropies_["rare"] == pytest.approx(-(7 / 8 * np.log2(7 / 8) + 1 / 8 * np.log2(1 / 8)))
    assert model.n_clusters_ == 8
    assert sorted(model.predict(INFO).tolist()) == list(range(8))


def test_attributes_of_equal_entropy_keep_their_order():
    info = {"b": [0, 1], "a": [1, 0], "c": [0, 0]}
    assert AttributeClusters(top_k=1).fit(info).columns_ == ["b"]


def test_attributes_of_equal_entropy_keep_their_order_whatever_it_rounds_to():
    first, second = (1, 1, 1, 4), (1, 1, 4, 1)  # the same sizes, whose sum rounds otherwise in another order
    info = {name: np.repeat(list("abcd"), sizes) for name, sizes in (("x", first), ("y", second))}
    model = AttributeClusters(1).fit(info)
    assert model.entropies_["x"] == model.entropies_["y"]
    assert model.columns_ == ["x"]


def test_attributes_all_of_them_equals_unique_rows():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (200, 4))
    info = {f"c{i}": table[:, i] for i in range(4)}
    ids = AttributeClusters().fit_predict(info)
    inverse = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    pairs = set(zip(ids.tolist(), inverse.tolist(), strict=True))
    assert len(pairs) == len(set(inverse.tolist())) == len(set(ids.tolist()))


def test_attributes_unseen_joint_value_has_no_cluster():
    model = AttributeClusters().fit({"a": [0, 1], "b": ["x", "y"], "unused": [1, 1]})
    new = {"a": [0, 0, 2, 1], "b": ["x", "y", "x", "y"], "unused": [1, 1, 1, 1]}
    ids = model.predict(new).tolist()
    assert ids[0] != ids[3]
    assert ids[1:3] == [-1, -1]


def test_attributes_are_numbers_of_numpy_in_any_column():
    column = [np.int64(3), None, np.float32(0.5), np.int64(3)]
    for values in (column, np.array(column, dtype=object)):
        model = AttributeClusters().fit({"a": values})
        assert model.values_ == [[None, 0.5, 3]]
        assert [type(value) for value in model.values_[0]] == [type(None), float, int]
        assert model.predict({"a": values}).tolist() == [2, 0, 1, 2]


def test_attributes_predict_reads_the_chosen_columns_only():
    model = AttributeClusters(top_k=1).fit(INFO)
    assert np.array_equal(model.predict({"quarter": INFO["quarter"]}), model.predict(INFO))


def test_more_attributes_refine_the_clusters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    info = {f"c{i}": np.where(rng.random(500) < 0.6, labels, rng.integers(0, 4, 500)) for i in range(6)}
    reports = [diagnose(AttributeClusters(top_k=k).fit_predict(info), labels) for k in range(1, 7)]
    for coarse, fine in pairwise(reports):
        assert fine.mutual_information >= coarse.mutual_information - 1e-12
        assert fine.conditional_entropy >= coarse.conditional_entropy - 1e-12


# --- hierarchy ----------------------------------------------------------------------------------------

PATHS = [
    ("animal", "dog"),
    ("animal", "cat", "lion"),
    ("food", "dog"),
    ("animal",),
    (),
    ("animal", "cat", "tiger"),
]


def test_hierarchy_is_cut_at_the_level():
    assert HierarchyClusters(1).fit_predict(PATHS).tolist() == [0, 0, 1, 0, -1, 0]
    model = HierarchyClusters(2).fit(PATHS)
    ids = model.predict(PATHS).tolist()
    assert model.n_clusters_ == 4
    assert model.nodes_ == [("animal",), ("animal", "cat"), ("animal", "dog"), ("food", "dog")]
    assert ids == [2, 1, 3, 0, -1, 1]  # ("animal",) ends above the cut: a node of its own


def test_hierarchy_unseen_node_has_no_cluster():
    model = HierarchyClusters(2).fit(PATHS)
    assert model.predict([("animal", "fish"), ("food",), ("animal", "cat", "puma")]).tolist() == [-1, -1, 1]


def test_a_deeper_cut_refines():
    ids = [HierarchyClusters(level).fit_predict(PATHS) for level in (1, 2, 3)]
    for coarse, fine in pairwise(ids):
        assert len(set(zip(coarse.tolist(), fine.tolist(), strict=True))) == len(set(fine.tolist()))


def test_predict_of_nothing_is_empty():
    for model, info, nothing in (
        (IdClusters(), [1], []),
        (AttributeClusters(), {"a": [1]}, {"a": []}),
        (HierarchyClusters(), [("a",)], []),
    ):
        ids = model.fit(info).predict(nothing)
        assert ids.shape == (0,)
        assert ids.dtype == np.int64


# --- state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "info", "new"),
    [
        (IdClusters(), ["b", "a", "b"], ["a", "c"]),
        (IdClusters(), [4, None, 2], [2, 4, 5]),
        (AttributeClusters(top_k=2), INFO, {**INFO, "coin": [5, *INFO["coin"][1:]]}),
        (HierarchyClusters(2), PATHS, [("animal", "cat"), ("rock",)]),
    ],
)
def test_state_survives_json(model, info, new):
    model.fit(info)
    for again in (
        type(model).from_state_dict(through_json(model.state_dict())),
        method_from_state_dict(model.state_dict()),
    ):
        assert type(again) is type(model)
        assert again.n_clusters_ == model.n_clusters_
        assert np.array_equal(again.predict(info), model.predict(info))
        assert np.array_equal(again.predict(new), model.predict(new))
        assert through_json(again.state_dict()) == through_json(model.state_dict())


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: IdClusters().fit("abc"), TypeError, "info: expected a sequence .* got str"),
        (lambda: IdClusters().fit(np.zeros((2, 2))), ValueError, "info: .*got 2 dimensions"),
        (
            lambda: IdClusters().fit([("a",)]),
            TypeError,
            r"info\[0\]: expected a string or a number, got tuple",
        ),
        (lambda: IdClusters().fit([1.0, float("nan")]), ValueError, r"info\[1\]: NaN"),
        (lambda: IdClusters().fit([-1, None]), ValueError, "info: expected at least one id"),
        (lambda: IdClusters().predict([1]), RuntimeError, "IdClusters is not fitted"),
        (lambda: IdClusters().state_dict(), RuntimeError, "IdClusters is not fitted"),
        (lambda: AttributeClusters(top_k=0), ValueError, "top_k"),
        (lambda: AttributeClusters(top_k="2"), TypeError, "top_k: expected an int, got str"),
        (lambda: AttributeClusters().fit([1, 2]), TypeError, "info: expected a mapping"),
        (lambda: AttributeClusters().fit({}), ValueError, "info: expected at least one attribute"),
        (lambda: AttributeClusters().fit({"a": []}), ValueError, "info: expected at least one sample"),
        (
            lambda: AttributeClusters(3).fit({"a": [1]}),
            ValueError,
            "top_k: expected at most the 1 attributes",
        ),
        (
            lambda: AttributeClusters().fit({"a": [1], "b": [1, 2]}),
            ValueError,
            r"info\['b'\]: expected 1 values",
        ),
        (lambda: AttributeClusters().fit({"a": "xyz"}), TypeError, r"info\['a'\]: .* got str"),
        (lambda: AttributeClusters(1).fit(INFO).predict({"a": [1]}), ValueError, "none named 'quarter'"),
        (lambda: AttributeClusters(1).fit(INFO).predict(None), TypeError, "info: expected a mapping"),
        (lambda: AttributeClusters().predict(INFO), RuntimeError, "AttributeClusters is not fitted"),
        (lambda: HierarchyClusters(0), ValueError, "level: expected at least 1, got 0"),
        (
            lambda: HierarchyClusters().fit(["a/b"]),
            TypeError,
            r"info\[0\]: expected a list of strings, got str",
        ),
        (lambda: HierarchyClusters().fit([("a",), (1,)]), TypeError, r"info\[1\]: expected strings, got int"),
        (lambda: HierarchyClusters().fit([()]), ValueError, "info: expected at least one path"),
        (lambda: HierarchyClusters().fit([]), ValueError, "info: expected at least one path"),
        (lambda: HierarchyClusters().predict(PATHS), RuntimeError, "HierarchyClusters is not fitted"),
        (lambda: method_from_state_dict({"method": "Other"}), ValueError, "got 'Other'"),
        (lambda: method_from_state_dict({}), ValueError, "got None"),
        (lambda: method_from_state_dict(None), TypeError, "state: expected a mapping, got NoneType"),
        (
            lambda: method_from_state_dict({"method": "KMeans"}),
            ValueError,
            "state: expected an entry 'n_clusters' of KMeans, got none",
        ),
        (lambda: HierarchyClusters.from_state_dict({"method": "IdClusters"}), ValueError, "one of Hier"),
    ],
)
def test_errors_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()


# --- the authors' ids ---------------------------------------------------------------------------------


def published(name: str) -> tuple[dict[int, list[str]], np.ndarray]:
    """Cluster ids by number of attributes, and the class, of the training split."""
    path = METADATA / name / "meta_data_train.csv"
    if not path.exists():
        pytest.skip(f"the published metadata of {name} is not there")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    grains = sorted(int(key.removeprefix("label_gran_")) for key in rows[0] if key.startswith("label_gran_"))
    ids = {k: [row[f"label_gran_{k}"] for row in rows] for k in grains}
    return ids, np.array([int(row["class"]) for row in rows])


@pytest.mark.parametrize("name", ["ut-zappos50k", "wider"])
def test_published_clusters_more_attributes_tell_more(name):
    ids, labels = published(name)
    reports = []
    for grain in sorted(ids):
        model = IdClusters()
        clusters = model.fit_predict(ids[grain])
        assert [model.values_[c] for c in clusters] == ids[grain]
        assert model.n_clusters_ == len(set(ids[grain]))
        report = diagnose(clusters, labels)
        assert report.entropy == pytest.approx(
            report.mutual_information + report.conditional_entropy, abs=1e-9
        )
        reports.append(report)
    information = [report.mutual_information for report in reports]
    assert information == sorted(information)
    assert all(report.mutual_information <= report.label_entropy for report in reports)


def test_published_clusters_of_wider_refine_each_other():
    """Joining k attributes of two values each: every step splits clusters in at most two."""
    ids, _ = published("wider")
    for k in range(1, 14):
        pairs = set(zip(ids[k], ids[k + 1], strict=True))
        assert len(pairs) == len(set(ids[k + 1]))
        assert len(set(ids[k + 1])) <= 2 * len(set(ids[k]))


def test_kmeans_state_is_found_by_name():
    model = KMeans(2).fit(np.eye(4))
    assert isinstance(method_from_state_dict(model.state_dict()), KMeans)
