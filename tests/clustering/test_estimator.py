"""scikit-learn's contract, kinds of arrays, weights, scales."""

from __future__ import annotations

import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch

from wscl_fast.clustering import (
    BalancedKMeans,
    BisectingKMeans,
    ClusterScheduler,
    FeatureFiles,
    HierarchicalKMeans,
    KMeans,
    method_from_state_dict,
)


def blobs(n: int, d: int, k: int, *, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, d))[rng.integers(k, size=n)] * 3 + rng.normal(size=(n, d)) * spread


@pytest.mark.filterwarnings("ignore")
def test_passes_the_checks_of_scikit_learn():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    model = KMeans(2, n_init=2, max_iter=5)
    # The one exception that scikit-learn grants its own KMeans.
    granted = {"check_sample_weight_equivalence_on_dense_data": "draws depend on the order of the samples"}
    results = checks.check_estimator(model, expected_failed_checks=granted, on_fail=None, on_skip=None)
    assert not [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert len(results) > 45
    # Asked for of its own classes only, by their base class.
    for check in (
        checks.check_clusterer_compute_labels_predict,
        checks.check_clustering,
        partial(checks.check_clustering, readonly_memmap=True),
    ):
        check("KMeans", model)


@pytest.mark.parametrize("method", [KMeans, BalancedKMeans, BisectingKMeans])
def test_a_clone_shares_the_process_group(method):
    base, group = pytest.importorskip("sklearn.base"), threading.Lock()  # of which there is no copy either
    start = {} if method is BisectingKMeans else {"init": np.eye(3)}
    model = method(3, group=group, sharded=True, **start)
    model.n_clusters_ = 3
    made = base.clone(model)
    assert made.group is group
    assert repr(made) == repr(model)
    assert not hasattr(made, "n_clusters_")
    if start:
        assert made.init is not model.init


def test_works_in_a_pipeline_and_a_clone_has_the_same_parameters():
    base, pipeline = pytest.importorskip("sklearn.base"), pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = blobs(200, 4, 3) * [1, 100, 1, 1]
    model = KMeans(3, n_init=2, random_state=4)
    assert base.clone(model).get_params() == model.get_params()
    chain = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
    assert chain.fit_transform(x).shape == (200, 3)
    assert np.array_equal(chain.predict(x), model.labels_)
    assert repr(model) == "KMeans(n_clusters=3, n_init=2, random_state=4)"
    assert model.get_feature_names_out().tolist() == ["kmeans0", "kmeans1", "kmeans2"]
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_transform_score_and_nearest_are_distances(metric):
    x = blobs(300, 5, 7) + 20
    model = KMeans(7, metric=metric).fit(x)
    u, c = x, model.cluster_centers_
    if metric == "cosine":
        u, c = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (u, c))
    expected = np.linalg.norm(u[:, None] - c, axis=2)
    np.testing.assert_allclose(model.transform(x), expected, rtol=1e-7, atol=1e-9)
    ids, distance = model.nearest(x, 3)
    assert np.array_equal(ids, expected.argsort(axis=1)[:, :3])
    np.testing.assert_allclose(distance, np.sort(expected, axis=1)[:, :3], rtol=1e-7, atol=1e-7)
    w = np.random.default_rng(0).random(300)
    assert model.score(x) == pytest.approx(-model.inertia_)
    assert model.score(x, sample_weight=w) == pytest.approx(-(w * expected.min(1) ** 2).sum())


def test_whole_weights_are_repeated_samples():
    x = blobs(150, 4, 5)
    w = np.random.default_rng(0).integers(0, 4, size=150)
    start = x[w > 0][:6]
    weighted = KMeans(6, init=start, tol=0).fit(x, sample_weight=w)
    repeated = KMeans(6, init=start, tol=0).fit(np.repeat(x, w, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)
    np.testing.assert_allclose(weighted.counts_, repeated.counts_)


def test_same_weights_and_start_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x, w = blobs(400, 6, 9, spread=2), np.random.default_rng(0).random(400)
    theirs = cluster.KMeans(9, init=x[:9], n_init=1, max_iter=40).fit(x, sample_weight=w)
    ours = KMeans(9, init=x[:9], max_iter=40).fit(x, sample_weight=w)
    assert np.array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_)


class Foreign:
    """An array of another library: all it shares is DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self) -> object:
        return type("namespace", (), {"from_dlpack": staticmethod(lambda t: Foreign(torch.from_dlpack(t)))})


def test_the_same_kind_comes_out(tmp_path):
    x = blobs(120, 3, 4).astype(np.float32)
    expected = KMeans(4).fit(x).labels_
    np.save(tmp_path / "x.npy", x)
    mapped = KMeans(4).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert np.array_equal(mapped.labels_, expected)
    foreign = KMeans(4).fit(Foreign(torch.from_numpy(x)))
    assert isinstance(foreign.labels_, Foreign)
    assert isinstance(foreign.transform(Foreign(torch.from_numpy(x))), Foreign)
    assert np.array_equal(foreign.labels_.tensor.numpy(), expected)
    assert np.array_equal(KMeans(4).fit_predict(x.tolist()), KMeans(4).fit_predict(x.astype(np.float64)))
    frame = pytest.importorskip("polars").DataFrame(x, schema=["a", "b", "c"])
    model = KMeans(4).fit(frame)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame.select("c", "b", "a"))


EVERY_KIND = [
    KMeans(8),
    KMeans(8, init="k-means||", algorithm="hamerly"),
    KMeans(8, init="random", n_init=2, metric="cosine"),
    KMeans(8, batch_size=256, max_iter=5),
    KMeans(8, empty="split"),
    BalancedKMeans(8, max_iter=4),
    BisectingKMeans(8),
    HierarchicalKMeans((8, 3), n_resampling=1),
]


ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("model", EVERY_KIND, ids=repr)
def test_tensors_on_any_device(model, device, tmp_path):
    """Clusters well apart are those that the CPU finds, and what comes out is where the samples are."""
    x = torch.from_numpy(blobs(2000, 16, 8, spread=0.1)).float()
    here, there = (type(model)(**model.get_params()) for _ in range(2))
    here.fit(x)
    there.fit(x.to(device))
    for name in ("labels_", "cluster_centers_", "counts_"):
        assert getattr(there, name).device.type == device, name
    assert torch.equal(there.labels_.cpu(), here.labels_)
    torch.testing.assert_close(there.cluster_centers_.cpu(), here.cluster_centers_, rtol=1e-5, atol=1e-5)
    assert there.inertia_ == pytest.approx(here.inertia_, rel=1e-5)
    found = there.predict(x.to(device))
    assert torch.equal(found, there.labels_) or isinstance(model, BalancedKMeans)
    assert np.array_equal(there.predict(x.numpy()), found.cpu().numpy())
    np.save(tmp_path / "x.npy", x.numpy())
    files = type(model)(**model.get_params()).fit(FeatureFiles(tmp_path, memory=1 << 16, device=device))
    assert isinstance(files.labels_, np.ndarray)
    if getattr(model, "batch_size", None) is None:  # batches are drawn within blocks
        assert np.array_equal(files.labels_, here.labels_.numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("model", EVERY_KIND, ids=repr)
def test_samples_that_are_not_finite_are_refused(model, value):
    x = blobs(100, 4, 8)
    fitted = type(model)(**model.get_params()).fit(x)
    x[3, 1] = value
    for method in (fitted.predict, fitted.transform, fitted.score, fitted.fit):
        with pytest.raises(ValueError, match=r"[xX]: expected finite numbers"):
            method(x)


@pytest.mark.parametrize("make", [KMeans, BalancedKMeans])
def test_zero_vectors_make_no_cluster(make):
    model = make(2, metric="cosine")
    with pytest.raises(
        ValueError, match="n_clusters: expected at most the 1 samples that are not zero, got 2"
    ):
        model.fit(np.eye(4, 3)[[0, 3, 3, 3]])


@pytest.mark.parametrize("weights", [None, [1, 1, 1, 0]])
def test_bisecting_needs_a_direction(weights):
    x = np.eye(4, 3)[[3, 3, 3, 3 if weights is None else 0]]
    with pytest.raises(
        ValueError, match=r"X: expected a sample that is not zero and has a weight \(cosine\)"
    ):
        BisectingKMeans(2, metric="cosine").fit(x, sample_weight=weights)


def test_a_zero_vector_is_no_start_of_balanced_clusters():
    x = np.concatenate([np.zeros((6, 3)), blobs(6, 3, 6)])
    for seed in range(8):
        model = BalancedKMeans(6, metric="cosine", init="random", random_state=seed).fit(x)
        np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1)


def test_state_of_balanced_clusters():
    x, new = blobs(90, 4, 3), blobs(40, 4, 3, seed=1)
    model = BalancedKMeans(3, cap=1.2, temperature=0.1, sinkhorn_iter=4, metric="cosine", tol=0).fit(x)
    for again in (
        BalancedKMeans.from_state_dict(model.state_dict()),
        method_from_state_dict(model.state_dict()),
    ):
        assert isinstance(again, BalancedKMeans)
        assert again.get_params() == model.get_params()
        assert np.array_equal(again.predict(new), model.predict(new))
        assert np.array_equal(again.transform(new), model.transform(new))
        assert np.array_equal(again.prices_, model.prices_)
    with pytest.raises(ValueError, match="expected one of KMeans, got method='BalancedKMeans'"):
        KMeans.from_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:k-means left")
def test_levels_of_few_distinct_samples():
    x = np.repeat(blobs(5, 3, 5), 40, axis=0)
    model = HierarchicalKMeans((64, 8), n_resampling=1, members=10).fit(x)
    assert [len(level) for level in model.levels_] == [64, 8]


@pytest.mark.filterwarnings("ignore:k-means left")
def test_levels_of_few_samples_that_are_not_zero():
    x = np.concatenate([np.eye(1, 3), np.eye(3)[1:2].repeat(5, axis=0), np.zeros((6, 3))])
    for seed in range(6):
        model = HierarchicalKMeans(
            (5, 2), metric="cosine", init="random", n_resampling=1, members=3, random_state=seed
        )
        assert len(model.fit(x).labels_) == 12


def test_levels_stand_in_for_their_numbers():
    x = blobs(60, 3, 4)
    model = HierarchicalKMeans(iter((4, 2))).fit(x)
    assert len(model.sample(10)) == 10
    distance = HierarchicalKMeans((4, 2)).fit_transform(x)
    assert np.array_equal(distance, model.transform(x))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_refused(layout):
    with pytest.raises(TypeError, match=r"X: a sparse matrix came .* use X\.toarray"):
        KMeans(2).fit(torch.eye(4).to_sparse(layout=layout))


def test_a_weight_that_is_refused_is_told():
    with pytest.raises(ValueError, match="sample_weight: expected finite numbers of at least 0, got inf"):
        KMeans(2).fit(np.eye(3), sample_weight=[1, np.inf, 2])


def test_lists_of_several_lengths_are_told_by_name():
    with pytest.raises(ValueError, match="X: expected numbers, got"):
        KMeans(2).fit([[0, 0], [1], [0, 1]])


def test_numbers_of_numpy():
    x = blobs(20, 3, 2)
    for weight in (2, np.float32(2), np.int64(2)):
        assert KMeans(2).fit(x, sample_weight=weight).counts_.sum() == 40
    assert KMeans(2, random_state=np.int64(3)).fit(x).state_dict()["random_state"] == 3
    assert ClusterScheduler(np.int64(4)).n_clusters == [4]
    with pytest.raises(TypeError, match="n_clusters: expected an int, got float"):
        ClusterScheduler(4.0)


def test_not_fitted_survives_a_pickle():
    exceptions = pytest.importorskip("sklearn.exceptions")
    with pytest.raises(exceptions.NotFittedError) as caught:
        KMeans(2).predict(np.eye(2))
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, exceptions.NotFittedError)
    assert str(again) == str(caught.value) == "KMeans is not fitted: call fit first"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_clustered_as_their_values(dtype):
    x = torch.from_numpy(blobs(300, 8, 6)).to(dtype)
    short, wide = KMeans(6).fit(x), KMeans(6).fit(x.float())
    assert torch.equal(short.labels_, wide.labels_)
    assert short.cluster_centers_.dtype == torch.float32
    assert torch.equal(short.cluster_centers_, wide.cluster_centers_)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samples_of_another_dtype_are_seen_from_the_same_origin(dtype):
    x = np.array([[2.0**24], [2.0**24 + 2]] * 10)  # whose mean float32 does not hold
    model = KMeans(2).fit(x)
    assert np.array_equal(model.predict(x.astype(dtype)), model.labels_)
    assert model.score(x.astype(dtype)) == 0
    assert np.array_equal(np.sort(model.transform(x.astype(dtype))), [[0, 2]] * 20)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("exponent", [-66, -40, 66, 100])
def test_a_power_of_two_changes_nothing(metric, exponent):
    x = blobs(300, 6, 5, spread=2).astype(np.float32)
    plain = KMeans(5, metric=metric, tol=0).fit(x)
    scaled = KMeans(5, metric=metric, tol=0).fit(x * np.float32(2.0**exponent))
    assert np.array_equal(plain.labels_, scaled.labels_)
    unit = 1.0 if metric == "cosine" else 2.0**exponent
    np.testing.assert_allclose(scaled.cluster_centers_ / unit, plain.cluster_centers_, rtol=1e-6)
    assert scaled.inertia_ / unit**2 == pytest.approx(plain.inertia_, rel=1e-6)


def test_verbose_prints_the_inertia_of_each_pass(capsys):
    model = KMeans(3, verbose=1).fit(blobs(50, 2, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Iteration 1, inertia {model.inertia_history_[0]:g}."
    assert len(lines) in (model.n_iter_, model.n_iter_ - 1)


def test_inertia_of_each_pass_is_that_of_its_centroids():
    x = blobs(400, 5, 12, spread=2.0)
    model = KMeans(12, tol=0, init=x[:12]).fit(x)
    c = x[:12]
    for value in model.inertia_history_:
        square = ((x[:, None] - c) ** 2).sum(-1)
        assert value == pytest.approx(square.min(1).sum())
        z = square.argmin(1)
        c = np.stack([x[z == k].mean(0) for k in range(12)])
    assert model.inertia_history_[-1] == model.inertia_
