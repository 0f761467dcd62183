from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from wscl_fast.clustering import diagnose, entropy


def test_known_case_clusters_equal_labels():
    report = diagnose([0, 0, 1, 1, 2, 2, 3, 3], [5, 5, 9, 9, 2, 2, 0, 0])
    assert report.entropy == pytest.approx(2)
    assert report.mutual_information == pytest.approx(2)
    assert report.conditional_entropy == pytest.approx(0)
    assert report.sizes == (2, 2, 2, 2)


def test_known_case_independent():
    z, t = np.divmod(np.arange(32), 8)
    report = diagnose(z, t)
    assert report.mutual_information == pytest.approx(0, abs=1e-12)
    assert report.conditional_entropy == pytest.approx(2)
    assert report.label_entropy == pytest.approx(3)


def test_known_case_instances_and_one_cluster():
    labels = np.repeat([0, 1], 8)
    instances = diagnose(np.arange(16), labels)  # each sample its own cluster: InfoNCE
    assert (instances.entropy, instances.mutual_information, instances.conditional_entropy) == (4, 1, 3)
    assert instances.n_singletons == 16
    single = diagnose(np.zeros(16, dtype=int), labels)
    assert (single.entropy, single.mutual_information, single.conditional_entropy) == (0, 0, 0)


def test_known_case_unequal_sizes():
    report = diagnose([0, 0, 1, 2])
    assert report.entropy == pytest.approx(1.5)
    assert report.sizes == (2, 1, 1)
    assert report.n_singletons == 2
    assert report.mutual_information is None
    assert report.n_labelled is None


def test_entropy_splits_into_information_and_remainder():
    rng = np.random.default_rng(0)
    for _ in range(20):
        z, t = rng.integers(0, 30, 500), rng.integers(0, 7, 500)
        report = diagnose(z, t)
        assert report.entropy == pytest.approx(
            report.mutual_information + report.conditional_entropy, abs=1e-12
        )
        assert 0 <= report.mutual_information <= report.label_entropy + 1e-12


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    z, t = rng.integers(0, 12, 300), rng.integers(0, 5, 300)
    assert diagnose(z, t).mutual_information == pytest.approx(metrics.mutual_info_score(z, t) / np.log(2))


def test_no_cluster_is_left_out_and_counted():
    report = diagnose([0, -1, 0, 1, -1, 1], [0, 1, 0, 1, -1, 1])
    assert (report.n_samples, report.n_ignored, report.n_clusters) == (6, 2, 2)
    assert report.entropy == pytest.approx(1)
    assert report.mutual_information == pytest.approx(1)
    assert report.n_labelled == 4


def test_unknown_labels_are_left_out_of_the_information_only():
    z, t = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, -1, -1])
    report, known = diagnose(z, t), diagnose(z[:4], t[:4])
    assert report.entropy == pytest.approx(np.log2(3))
    assert report.mutual_information == known.mutual_information == pytest.approx(1)
    assert report.conditional_entropy == known.conditional_entropy
    assert report.n_labelled == 4


def test_nothing_to_measure():
    empty = diagnose([-1, -1], [0, 1])
    assert (empty.n_clusters, empty.entropy, empty.n_labelled, empty.mutual_information) == (0, 0, 0, None)
    assert "0 of 2 samples" in str(empty)
    assert diagnose([0, 1], [-1, -1]).conditional_entropy is None


def test_sparse_ids_and_every_kind_of_input():
    z = [10**12, 10**12, 3, 3]
    reports = {diagnose(z), diagnose(np.array(z)), diagnose(torch.tensor(z))}
    assert len(reports) == 1
    assert reports.pop().n_clusters == 2


def test_dict_and_text():
    report = diagnose([0, 0, 1, -1], [0, 0, 1, 1])
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert as_dict["sizes"] == [2, 1]
    assert as_dict["entropy"] == pytest.approx(entropy(np.array([1, 2])))
    text = str(report)
    assert "3 of 4 samples in 2 clusters" in text
    assert "H(Z) = 0.918 bits" in text
    assert "I(Z;T) = 0.918 bits" in text


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        (([],), ValueError, "clusters: expected at least one sample"),
        (([[0]],), ValueError, "clusters: expected one id per sample"),
        (([0.5],), TypeError, "clusters: expected integers, got float64"),
        ((["a"],), TypeError, "clusters: expected integers"),
        (([-2],), ValueError, "clusters: expected ids of at least -1, got -2"),
        (
            (np.array([2**63 + 5, 1], dtype=np.uint64),),
            ValueError,
            "clusters: expected ids of at most 9223372036854775807, got 9223372036854775813",
        ),
        (([0, 1], [0]), ValueError, "labels: expected 2 values as in clusters, got 1"),
        (([0, 1], [0.0, 1.0]), TypeError, "labels: expected integers"),
    ],
)
def test_errors_name_the_argument(args, error, match):
    with pytest.raises(error, match=match):
        diagnose(*args)


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        (["a"], TypeError, "counts: expected numbers"),
        ([1, -2], ValueError, "counts: expected finite numbers of at least 0, got -2"),
        ([1.0, np.nan], ValueError, "counts: expected finite numbers of at least 0, got nan"),
    ],
)
def test_entropy_takes_counts_of_any_kind(counts, error, match):
    assert entropy([1, 1]) == entropy((1, 0, 1)) == entropy(np.array([0.5, 0.5])) == 1.0
    assert entropy([]) == entropy([3]) == 0.0
    with pytest.raises(error, match=match):
        entropy(counts)


@pytest.mark.parametrize(
    "counts",
    [np.array([60000, 60000], dtype=np.float16), np.array([2**62, 2**62]), [1e308, 1e308]],
    ids=["float16", "int64", "float64"],
)
def test_counts_whose_sum_is_out_of_range(counts):
    assert entropy(counts) == 1


def test_entropy_tells_what_it_refuses():
    with pytest.raises(ValueError, match="counts: expected finite numbers of at least 0, got inf"):
        entropy([1.0, np.inf])
