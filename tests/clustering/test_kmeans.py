from __future__ import annotations

import io
import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from wscl_fast.clustering import BalancedKMeans, BisectingKMeans, HierarchicalKMeans, KMeans
from wscl_fast.clustering.bounds import Bounds
from wscl_fast.clustering.points import Points


def blobs(n: int, d: int, k: int, *, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(k, d))[rng.integers(k, size=n)] * 3 + rng.normal(size=(n, d)) * spread


# --- against scikit-learn -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n", "d", "k", "spread"), [(600, 2, 4, 0.3), (2000, 16, 20, 2.0), (500, 5, 120, 3.0)]
)
def test_same_start_same_clusters_as_scikit_learn(dtype, n, d, k, spread):
    cluster = pytest.importorskip("sklearn.cluster")
    x = (blobs(n, d, k, spread=spread) + 100).astype(dtype)
    start = x[np.random.default_rng(1).choice(n, k, replace=False)]
    theirs = cluster.KMeans(k, init=start, n_init=1, max_iter=50, tol=1e-4, algorithm="lloyd").fit(x)
    ours = KMeans(k, init=start, max_iter=50, tol=1e-4).fit(x)
    assert np.array_equal(ours.labels_, theirs.labels_)
    assert ours.n_iter_ == theirs.n_iter_
    exact = ((x.astype(np.float64) - theirs.cluster_centers_.astype(np.float64)[theirs.labels_]) ** 2).sum()
    assert ours.inertia_ == pytest.approx(exact, rel=1e-6)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-5)
    assert np.array_equal(ours.predict(x), theirs.predict(x))


def test_same_start_same_clusters_as_faiss():
    faiss = pytest.importorskip("faiss")
    x = blobs(2000, 16, 20, spread=0.5).astype(np.float32)
    start = x[np.random.default_rng(1).choice(2000, 20, replace=False)]
    theirs = faiss.Kmeans(16, 20, niter=30, max_points_per_centroid=2000, min_points_per_centroid=1)
    theirs.train(x, init_centroids=start)
    ours = KMeans(20, init=start, max_iter=30, tol=0).fit(x)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.centroids, rtol=1e-4, atol=1e-4)
    assert np.array_equal(ours.predict(x), theirs.index.search(x, 1)[1][:, 0])
    assert ours.inertia_ == pytest.approx(float(theirs.obj[-1]), rel=1e-5)


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
@pytest.mark.parametrize("where", [0, 12_345, 19_999])
def test_no_sample_is_left_out(init, where):
    """Where a subset is trained on (256 samples a cluster, say), one sample of 20,000 is not met."""
    x = blobs(20_000, 4, 3, spread=0.5)
    x[where] = 1e3
    found = KMeans(3, init=init, random_state=0).fit(x)
    own = found.labels_ == found.labels_[where]
    assert own.sum() == 1
    means = np.stack([x[found.labels_ == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(found.cluster_centers_, means, rtol=1e-9)
    assert found.inertia_ == pytest.approx(((x - means[found.labels_]) ** 2).sum(), rel=1e-9)


def test_empty_clusters_take_the_farthest_points_as_in_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(300, 3, 6, spread=0.5)
    start = np.concatenate([x[:3], np.full((3, 3), 1e3) + np.arange(3)[:, None]])
    theirs = cluster.KMeans(6, init=start, n_init=1, max_iter=50).fit(x)
    ours = KMeans(6, init=start).fit(x)
    assert np.bincount(ours.labels_, minlength=6).min() > 0
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9)


def test_seeding_is_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(1500, 8, 40, spread=0.2)
    ours = np.mean([KMeans(40, random_state=s).fit(x).inertia_ for s in range(8)])
    theirs = np.mean(
        [cluster.KMeans(40, n_init=1, max_iter=50, random_state=s).fit(x).inertia_ for s in range(8)]
    )
    assert ours <= theirs * 1.15


def test_cosine_equals_scikit_learn_on_a_sphere_up_to_the_projection():
    """At a fixed point of spherical k-means each centroid is the direction of the sum of its points."""
    x = blobs(800, 6, 12, spread=1.0)
    model = KMeans(12, metric="cosine", max_iter=200, tol=0).fit(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    sums = np.stack([unit[model.labels_ == k].sum(0) for k in range(12)])
    np.testing.assert_allclose(
        model.cluster_centers_, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-12
    )
    assert np.array_equal(model.labels_, (unit @ model.cluster_centers_.T).argmax(1))
    assert model.inertia_ == pytest.approx((2 - 2 * (unit @ model.cluster_centers_.T).max(1)).sum(), rel=1e-9)


@pytest.mark.parametrize("seed", range(80, 120))
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_bounds_change_nothing_among_near_ties(seed, metric):
    """Two dimensions, far from the origin: directions so close that a sum's rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(12, 2, generator=generator)
    x = middles[torch.randint(12, (400,), generator=generator)] + 0.7 * torch.randn(
        400, 2, generator=generator
    )
    x = (x.round() if seed % 2 else x) + 1e4
    start = x[torch.randperm(400, generator=generator)[:12]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lattices have fewer directions than clusters
        runs = [
            KMeans(12, init=start, metric=metric, algorithm=algorithm, tol=0).fit(x)
            for algorithm in ("lloyd", "hamerly")
        ]
    assert torch.equal(runs[0].labels_, runs[1].labels_)
    assert runs[0].n_iter_ == runs[1].n_iter_
    if metric == "cosine":  # the very same sums
        assert torch.equal(runs[0].cluster_centers_, runs[1].cluster_centers_)


def test_sums_are_taken_afresh_when_a_sample_far_outside_leaves():
    """In float64 1e10 takes six of the digits of 1e-3 along; a cluster's mean must not show it."""
    generator = torch.Generator().manual_seed(0)
    x = 1e-3 * torch.randn(500, 4, generator=generator)
    x[0] = 1e10
    bounds = Bounds(Points(x), 2)
    bounds.search(torch.tensor([[0.0] * 4, [-1.0] * 4]))
    assert bounds.assignment.unique().tolist() == [0]
    exact = x[1:].double().sum(dim=0)
    left = bounds.sums[0] - x[0].double()
    assert (left - exact).abs().max() > 1e-8
    assert bounds.search(torch.tensor([[0.0] * 4, [1e10] * 4])) == 1
    assert bounds.assignment.nonzero().tolist() == [[0]]
    torch.testing.assert_close(bounds.sums[0], exact, rtol=0, atol=1e-14)


# --- the estimator ------------------------------------------------------------------------------------


def test_finds_well_separated_clusters():
    truth = np.repeat(np.arange(50), 20)
    x = np.random.default_rng(0).normal(size=(50, 10))[truth] * 100 + np.random.default_rng(1).normal(
        size=(1000, 10)
    )
    labels = KMeans(50, n_init=3).fit_predict(x)
    assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 50


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_same_seed_same_clusters_and_another_seed_another_start(metric):
    x = blobs(400, 4, 30, spread=3.0)
    a, b, c = (KMeans(30, metric=metric, random_state=s).fit(x) for s in (3, 3, 4))
    assert np.array_equal(a.cluster_centers_, b.cluster_centers_)
    assert np.array_equal(a.labels_, b.labels_)
    assert not np.array_equal(a.cluster_centers_, c.cluster_centers_)


def test_restarts_keep_the_lowest_inertia():
    x = blobs(400, 4, 30, spread=2.0)
    inertias = [KMeans(30, n_init=n).fit(x).inertia_ for n in (1, 2, 4, 8)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_of_equally_good_restarts_the_first_is_kept():
    """They find the same clusters under other numbers, and inertias that differ in float64's last digit."""
    for seed in range(12):
        x = blobs(300, 4, 3, seed=seed)
        models = [
            KMeans(3, init="random", random_state=seed, algorithm=algorithm).fit(x)
            for algorithm in ("lloyd", "hamerly")
        ]
        assert np.array_equal(models[0].labels_, models[1].labels_)


def test_inertia_never_rises_with_more_iterations():
    x = blobs(500, 5, 20, spread=2.0)
    inertias = [KMeans(20, max_iter=m, tol=0).fit(x).inertia_ for m in range(1, 12)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(inertias))


def test_warm_start_from_the_solution_stops_at_once():
    x = blobs(500, 5, 8)
    cold = KMeans(8, max_iter=300, tol=0).fit(x)
    warm = KMeans(8, init=cold.cluster_centers_, tol=0).fit(x)
    assert warm.n_iter_ <= 2
    assert np.array_equal(warm.labels_, cold.labels_)


def test_numpy_gives_numpy_and_torch_gives_torch():
    x = blobs(100, 3, 4).astype(np.float32)
    ours = KMeans(4).fit(x)
    assert isinstance(ours.cluster_centers_, np.ndarray)
    assert ours.cluster_centers_.dtype == np.float32
    assert ours.labels_.dtype == np.int64
    theirs = KMeans(4).fit(torch.from_numpy(x).requires_grad_())
    assert isinstance(theirs.cluster_centers_, torch.Tensor)
    assert not theirs.cluster_centers_.requires_grad
    assert np.array_equal(theirs.labels_.numpy(), ours.labels_)
    assert isinstance(theirs.predict(x), np.ndarray)
    assert isinstance(ours.predict(torch.from_numpy(x)), torch.Tensor)
    assert np.array_equal(ours.predict(x.astype(np.float64)), ours.labels_)


def test_input_is_not_changed_and_may_be_strided_or_read_only():
    x = blobs(200, 6, 4)
    expected = KMeans(4).fit(x[:, ::2].copy()).labels_
    view = x[:, ::2]
    view.flags.writeable = False
    before = x.copy()
    assert np.array_equal(KMeans(4).fit(view).labels_, expected)
    assert np.array_equal(
        KMeans(4, metric="cosine").fit(view).labels_, KMeans(4, metric="cosine").fit_predict(view)
    )
    assert np.array_equal(x, before)


def test_data_far_from_the_origin_in_float32():
    x = np.round(blobs(600, 4, 6, spread=0.2) * 64) / 64
    near = KMeans(6, n_init=2).fit(x.astype(np.float32))
    far = KMeans(6, n_init=2).fit((x + 2.0**16).astype(np.float32))
    assert np.array_equal(near.labels_, far.labels_)
    # 2^16 + c keeps 2^-8 of c, so the inertia must be taken before the centroids are moved back
    assert far.inertia_ == pytest.approx(near.inertia_, rel=1e-5)


def test_zero_vectors_sit_out_of_a_cosine_fit():
    x = blobs(200, 4, 5)
    with_zeros = np.concatenate([x[:50], np.zeros((3, 4)), x[50:]])
    plain = KMeans(5, metric="cosine").fit(x)
    model = KMeans(5, metric="cosine").fit(with_zeros)
    np.testing.assert_allclose(model.cluster_centers_, plain.cluster_centers_)
    assert model.labels_[50:53].tolist() == [0, 0, 0]
    assert np.array_equal(np.delete(model.labels_, [50, 51, 52]), plain.labels_)
    assert model.inertia_ == pytest.approx(plain.inertia_ + 3)
    assert model.predict(np.zeros((1, 4))).tolist() == [0]


def test_cosine_ignores_length_even_when_tiny():
    x = blobs(200, 4, 5)
    scale = 10.0 ** np.random.default_rng(0).integers(-150, 100, size=(200, 1))
    plain = KMeans(5, metric="cosine").fit(x)
    assert np.array_equal(KMeans(5, metric="cosine").fit(x * scale).labels_, plain.labels_)


def test_every_sample_its_own_cluster_and_one_cluster():
    x = blobs(30, 3, 4)
    model = KMeans(30).fit(x)
    assert sorted(model.labels_.tolist()) == list(range(30))
    assert model.inertia_ == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(KMeans(1).fit(x).cluster_centers_[0], x.mean(0))


def test_too_few_distinct_samples_warns():
    x = np.repeat(np.eye(3), 10, axis=0)
    with pytest.warns(UserWarning, match="left 2 of 5 clusters empty"):
        model = KMeans(5).fit(x)
    assert model.inertia_ == pytest.approx(0, abs=1e-12)
    assert len(set(model.labels_.tolist())) == 3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_state_dict_round_trip(metric):
    x = blobs(200, 4, 6)
    model = KMeans(6, metric=metric, n_init=2, max_iter=7, tol=1e-3, random_state=5).fit(torch.from_numpy(x))
    again = KMeans.from_state_dict(model.state_dict())
    assert np.array_equal(again.predict(x), model.predict(x))
    first, second = model.state_dict(), again.state_dict()
    assert np.array_equal(first.pop("centroids"), second.pop("centroids"))
    assert first == second


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_a_state_sees_rows_of_any_length_as_the_model_does(scale):
    rng = np.random.default_rng(0)
    x = ((np.ones(3) + 1e-6 * rng.normal(size=(400, 3))) * scale).astype(np.float32)
    model = KMeans(20, metric="cosine", max_iter=3).fit(x)
    again = KMeans.from_state_dict(model.state_dict())
    assert np.array_equal(again.predict(x), model.predict(x))
    older = {name: value for name, value in model.state_dict().items() if name != "wild_lengths"}
    assert KMeans.from_state_dict(older).predict(x).shape == (400,)


@pytest.mark.parametrize("change", ["metric", "dtype"])
def test_bounds_of_another_metric_or_dtype_are_left_out(change):
    x = blobs(300, 4, 5)
    model = KMeans(5, warm_start=True, algorithm="hamerly", max_iter=1).fit(x)
    if change == "metric":
        model.set_params(metric="cosine")
    else:
        x = x.astype(np.float32)
    model.fit(x, drift=np.zeros(300))
    assert np.array_equal(model.labels_, model.predict(x))


def test_what_a_user_writes_into_results_does_not_reach_the_next_fit():
    x = torch.from_numpy(blobs(300, 4, 5))
    model = KMeans(5, warm_start=True, algorithm="hamerly").fit(x)
    expected = model.labels_.clone()
    model.labels_[:5] = -1
    model.fit(x, drift=torch.zeros(300))
    assert torch.equal(model.labels_, expected)
    counts = KMeans(5).partial_fit(x)
    before, kept = counts.counts_, counts.counts_.clone()
    counts.partial_fit(x)
    assert torch.equal(before, kept)


@pytest.mark.parametrize("offset", [1e4, 1e7])
def test_a_pickle_without_a_memo_predicts_the_same(offset):
    """joblib's: one array that is held twice comes back as two."""
    x = (np.random.default_rng(0).normal(size=(300, 3)) * 1e-2 * offset / 1e4 + offset).astype(np.float32)
    model = KMeans(8).fit(x)
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.fast = True
    pickler.dump(model)
    again = pickle.loads(file.getvalue())
    assert np.array_equal(again.predict(x), model.predict(x))
    assert again.score(x) == model.score(x)
    model.cluster_centers_ = x[:8].copy()  # what a user set is not lost either
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))


@pytest.mark.parametrize("exponent", [-660, 660])
@pytest.mark.parametrize("make", [KMeans, BisectingKMeans, BalancedKMeans, HierarchicalKMeans])
def test_float64_of_any_scale(make, exponent):
    x = blobs(60, 3, 4)
    scaled = np.ldexp(x, exponent)
    plain, model = (make((4, 2) if make is HierarchicalKMeans else 4).fit(rows) for rows in (x, scaled))
    assert np.array_equal(model.labels_, plain.labels_)
    far = np.ldexp(model.transform(scaled), -exponent)
    np.testing.assert_allclose(far, plain.transform(x), atol=1e-9)
    for found, value in ((model.inertia_, plain.inertia_), (model.score(scaled), plain.score(x))):
        with np.errstate(over="ignore"):
            assert found == pytest.approx(np.ldexp(value, 2 * exponent), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [KMeans, BisectingKMeans, BalancedKMeans, HierarchicalKMeans])
def test_a_zero_vector_is_at_distance_one(make, weighted):
    x = blobs(50, 3, 4)
    x[:5] = 0
    weights = np.random.default_rng(1).random(50) + 1 if weighted else np.ones(50)
    model = make((4, 2) if make is HierarchicalKMeans else 4, metric="cosine")
    if weighted and make in (BalancedKMeans, HierarchicalKMeans):
        pytest.skip("takes no weights")
    model = model.fit(x, sample_weight=weights) if weighted else model.fit(x)
    far = model.transform(x)
    assert model.inertia_ == pytest.approx(far[np.arange(50), model.labels_] ** 2 @ weights)
    assert model.score(x, sample_weight=weights) == pytest.approx(-(far.min(axis=1) ** 2) @ weights)
    np.testing.assert_allclose(model.nearest(x, 3)[1], np.sort(far, axis=1)[:, :3], atol=1e-7)


@pytest.mark.parametrize("other", ["samples", "weights", "init"])
def test_a_checkpoint_refuses_another_problem(other, tmp_path):
    rng = np.random.default_rng(0)
    given = {
        "samples": rng.normal(size=(640, 3)),
        "weights": np.arange(640.0),
        "init": rng.normal(size=(4, 3)),
    }

    def fit(samples, weights, init):
        return KMeans(4, init=init, checkpoint=tmp_path / "state").fit(samples, sample_weight=weights)

    first = fit(**given)
    assert np.array_equal(fit(**given).labels_, first.labels_)
    given[other] = given[other].copy()
    if other == "samples":
        given[other][1:10] *= 5
    else:
        given[other] = given[other][::-1]
    with pytest.raises(ValueError, match=r"belongs to another fit, with other (samples|init)"):
        fit(**given)


# --- errors -------------------------------------------------------------------------------------------

GOOD = blobs(20, 3, 2)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: KMeans(0).fit(GOOD), ValueError, "n_clusters: expected at least 1, got 0"),
        (lambda: KMeans(2.0).fit(GOOD), TypeError, "n_clusters: expected an int, got float"),
        (lambda: KMeans(True).fit(GOOD), TypeError, "n_clusters: expected an int, got bool"),
        (lambda: KMeans(2, metric="l1").fit(GOOD), ValueError, "metric: expected one of .*'l1'"),
        (lambda: KMeans(2, init="best").fit(GOOD), ValueError, "init: expected .*'best'"),
        (lambda: KMeans(2, n_init=0).fit(GOOD), ValueError, "n_init"),
        (lambda: KMeans(2, max_iter=0).fit(GOOD), ValueError, "max_iter"),
        (lambda: KMeans(2, tol=-1.0).fit(GOOD), ValueError, "tol"),
        (lambda: KMeans(2, tol=float("nan")).fit(GOOD), ValueError, "tol"),
        (lambda: KMeans(2, random_state=-1).fit(GOOD), ValueError, "random_state: .*got -1"),
        (lambda: KMeans(2, random_state="a").fit(GOOD), TypeError, "random_state: .*got str"),
        (lambda: KMeans(2, algorithm="elkan").fit(GOOD), ValueError, "algorithm: expected one of .*'elkan'"),
        (lambda: KMeans(2, empty="drop").fit(GOOD), ValueError, "empty: expected one of .*'drop'"),
        (lambda: KMeans(2, group="all").fit(GOOD), ValueError, "group: expected None unless sharded"),
        (lambda: KMeans(2, shard_centroids=True).fit(GOOD), ValueError, "sharded: expected another.*False"),
        (
            lambda: KMeans(2, sharded=True, shard_centroids=True, empty="split").fit(GOOD),
            ValueError,
            "empty: expected another value with shard_centroids, got 'split'",
        ),
        (
            lambda: KMeans(2, sharded=True, shard_centroids=True, batch_size=5).fit(GOOD),
            ValueError,
            "batch_size: expected None with shard_centroids, got 5",
        ),
        (lambda: KMeans(2).fit(GOOD, drift=GOOD[:, 0]), ValueError, "drift: expected None unless warm_start"),
        (lambda: KMeans(2).fit(np.ones(3)), ValueError, r"X: expected \[samples, features\], .* shape \[3\]"),
        (lambda: KMeans(2).fit(np.ones((3, 0))), ValueError, r"0 feature\(s\) \(shape=\(3, 0\)\)"),
        (lambda: KMeans(2).fit(np.array([[1.0], [np.nan]])), ValueError, "X: .*NaN or infinity"),
        (lambda: KMeans(2).fit(np.array([[1.0], [np.inf]])), ValueError, "X: .*NaN or infinity"),
        (lambda: KMeans(2).fit(GOOD + 1j), ValueError, "Complex data not supported"),
        (lambda: KMeans(2).fit(torch.eye(3).to_sparse()), TypeError, "sparse"),
        (lambda: KMeans(21).fit(GOOD), ValueError, "n_clusters: expected at most the 20 samples, got 21"),
        (lambda: KMeans(2).fit(GOOD[:0]), ValueError, r"0 sample\(s\)"),
        (
            lambda: KMeans(2, metric="cosine").fit(np.array([[0.0], [1.0]])),
            ValueError,
            "at most the 1 samples that are not zero, got 2",
        ),
        (lambda: KMeans(2, init=np.ones((3, 3))).fit(GOOD), ValueError, r"init: expected centroids \[2, 3\]"),
        (lambda: KMeans(2, init=np.full((2, 3), np.nan)).fit(GOOD), ValueError, "init: .*NaN"),
        (
            lambda: KMeans(2, metric="cosine", init=np.eye(3)[:2] * [[1], [0]]).fit(GOOD),
            ValueError,
            "init: .*zero vector",
        ),
        (lambda: KMeans(2).fit(GOOD, sample_weight=np.zeros(20)), ValueError, "sample_weight: .*non-zero"),
        (
            lambda: KMeans(2).fit(GOOD, sample_weight=-(GOOD[:, 0] ** 2)),
            ValueError,
            "sample_weight: .*at least 0",
        ),
        (lambda: KMeans(2).fit(GOOD, sample_weight=np.ones(3)), ValueError, r"sample_weight.shape == \(3,\)"),
        (lambda: KMeans(2).predict(GOOD), RuntimeError, "KMeans is not fitted"),
        (lambda: KMeans(2).state_dict(), RuntimeError, "KMeans is not fitted"),
        (
            lambda: KMeans(2).fit(GOOD).predict(GOOD[:, :2]),
            ValueError,
            "X has 2 features, but KMeans is expecting 3",
        ),
        (lambda: KMeans().set_params(k=3), ValueError, "Invalid parameter 'k'"),
        (lambda: KMeans(2, tol="x").fit(GOOD), TypeError, "tol: expected a number, got str"),
        (lambda: KMeans(2, tol=None).fit(GOOD), TypeError, "tol: expected a number, got NoneType"),
        (lambda: KMeans(2, warm_start="no").fit(GOOD), TypeError, "warm_start: expected a bool, got str"),
        (lambda: KMeans(2, sharded=GOOD).fit(GOOD), TypeError, "sharded: expected a bool, got ndarray"),
        (lambda: KMeans(2, shard_centroids=1).fit(GOOD), TypeError, "shard_centroids: expected a bool"),
        (lambda: KMeans(2, metric=GOOD).fit(GOOD), ValueError, "metric: expected one of"),
        (lambda: KMeans(2, algorithm=GOOD).fit(GOOD), ValueError, "algorithm: expected one of"),
        (lambda: KMeans(2, empty=GOOD).fit(GOOD), ValueError, "empty: expected one of"),
        (lambda: KMeans(2, n_init=GOOD).fit(GOOD), TypeError, "n_init: expected an int, got ndarray"),
        (
            lambda: KMeans(2, random_state=2**70).fit(GOOD),
            ValueError,
            r"random_state: expected 0 to 9223372036854775807, got 1180591620717411303424",
        ),
        (
            lambda: KMeans(2).fit(torch.ones(4, 2, device="meta")),
            ValueError,
            "X: expected numbers, got a tensor on the meta device, which has none",
        ),
        (
            lambda: KMeans(2).fit(GOOD).predict(torch.ones(4, 3, device="meta")),
            ValueError,
            "X: expected numbers, got a tensor on the meta device",
        ),
        (
            lambda: KMeans(2).fit(GOOD, sample_weight=torch.ones(20, device="meta")),
            ValueError,
            "sample_weight: expected numbers, got a tensor on the meta device",
        ),
        (lambda: KMeans.from_state_dict(5), TypeError, "state: expected a mapping, got int"),
        (lambda: KMeans(2).fit(GOOD).nearest(GOOD, -1), ValueError, "top: expected 1 to 2, got -1"),
        (lambda: KMeans(2).fit(GOOD).nearest(GOOD[:0], 9), ValueError, "top: expected 1 to 2, got 9"),
        (lambda: KMeans(2).fit(GOOD).nearest(GOOD, 1.5), TypeError, "top: expected an int, got float"),
        (lambda: KMeans.from_state_dict({"method": "IdClusters"}), ValueError, "expected one of KMeans"),
    ],
)
def test_errors_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()
