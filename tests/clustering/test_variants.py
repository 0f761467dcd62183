"""Mini-batch, balanced, bisecting and hierarchical k-means; policies for empty clusters; starts; bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wscl_fast import KMeans
from wscl_fast.clustering import BalancedKMeans, BisectingKMeans, HierarchicalKMeans, diagnose
from wscl_fast.clustering.empty import fill_empty, split_largest
from wscl_fast.clustering.hierarchical_kmeans import even_shares
from wscl_fast.clustering.points import Points


def blobs(n: int, d: int, k: int, *, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(k, size=n)
    return rng.normal(size=(k, d))[truth] * 8 + rng.normal(size=(n, d)) * spread, truth


def agreement(labels: np.ndarray, truth: np.ndarray) -> float:
    report = diagnose(labels, truth)
    assert report.mutual_information is not None
    assert report.label_entropy is not None
    return report.mutual_information / report.label_entropy


# --- mini-batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_mini_batches_find_the_clusters(metric):
    x, truth = blobs(2000, 8, 10)
    model = KMeans(10, metric=metric, batch_size=128, max_iter=20).fit(x)
    full = KMeans(10, metric=metric).fit(x)
    assert model.inertia_ <= 1.05 * full.inertia_
    assert agreement(model.labels_, truth) > 0.95
    assert np.array_equal(model.predict(x), model.labels_)
    assert model.score(x) == pytest.approx(-model.inertia_)


def test_partial_fit_is_the_mean_of_what_came():
    x, _ = blobs(600, 5, 4)
    model = KMeans(4)
    for start in range(0, 600, 100):
        model.partial_fit(x[start : start + 100])
    assert model.n_steps_ == 6
    assert float(model.counts_.sum()) == 600
    # Well apart, no sample changes its cluster: the running means are the means.
    labels = model.predict(x)
    np.testing.assert_allclose(model.cluster_centers_, [x[labels == k].mean(0) for k in range(4)], atol=1e-9)
    with pytest.raises(ValueError, match="X has 3 features, but KMeans is expecting 5"):
        model.partial_fit(x[:, :3])
    with pytest.raises(ValueError, match="expected at most the 3 samples, got 4"):
        KMeans(4).partial_fit(x[:3])
    assert KMeans(4).partial_fit(x[:100]).fit(x).inertia_ == KMeans(4).fit(x).inertia_


def test_mini_batches_are_the_same_every_time():
    x, _ = blobs(500, 4, 6)
    a, b = (KMeans(6, batch_size=64, random_state=3).fit(x) for _ in range(2))
    assert np.array_equal(a.cluster_centers_, b.cluster_centers_)


def test_mini_batch_inertias_are_of_all_samples_and_their_weight():
    x, _ = blobs(1050, 4, 6)  # the last batch is a short one
    plain, heavy = (
        KMeans(6, batch_size=100, max_iter=3).fit(x, sample_weight=weight)
        for weight in (None, np.full(1050, 5.0))
    )
    assert heavy.inertia_history_ == pytest.approx([5 * value for value in plain.inertia_history_])
    alone = KMeans(1, init=np.zeros((1, 4)), batch_size=1050, max_iter=1).fit(x)
    assert alone.inertia_history_[0] == pytest.approx((x**2).sum())


def test_partial_fit_leaves_zero_vectors_out_of_every_batch():
    x = blobs(40, 4, 3)[0]
    x[:5] = x[20:24] = 0
    model = KMeans(3, metric="cosine").partial_fit(x[:20])
    assert model.counts_.sum() == 15
    assert model.partial_fit(x[20:]).counts_.sum() == 31
    with pytest.raises(ValueError, match="at most the 0 samples that are not zero, got 3"):
        KMeans(3, metric="cosine").partial_fit(np.zeros((5, 4)))


@pytest.mark.parametrize(("name", "value"), [("n_clusters", 4), ("metric", "cosine")])
def test_batches_do_not_go_on_with_other_parameters(name, value):
    x, _ = blobs(60, 3, 5)
    model = KMeans(5).partial_fit(x)
    began = model.get_params()[name]
    with pytest.raises(
        ValueError, match=f"{name}: expected {began!r} as in the batches before, got {value!r}"
    ):
        model.set_params(**{name: value}).partial_fit(x)
    assert model.set_params(**{name: began}).partial_fit(x).n_steps_ == 2
    assert model.set_params(**{name: value}).fit(x).partial_fit(x).n_steps_ == 1


def test_partial_fit_has_a_state_and_nothing_of_a_fit_before():
    x = blobs(60, 4, 3)[0]
    model = KMeans(3).fit(x).partial_fit(x)
    assert not any(hasattr(model, name) for name in ("inertia_", "inertia_history_", "n_iter_"))
    again = KMeans.from_state_dict(model.state_dict())
    assert np.array_equal(again.predict(x), model.predict(x))
    assert again.state_dict()["inertia"] is None


def test_partial_fit_goes_on_from_inference_mode():
    x = torch.from_numpy(blobs(60, 4, 3)[0])
    with torch.inference_mode():
        model = KMeans(3).partial_fit(x[:30])
    model.partial_fit(x[30:])
    assert torch.equal(model.counts_, KMeans(3).partial_fit(x[:30]).partial_fit(x[30:]).counts_)


# --- balanced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("cap", [1.0, 1.3])
def test_no_cluster_beyond_its_cap(metric, cap):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(700, 5)), rng.normal(size=(103, 5)) + 6])
    model = BalancedKMeans(9, cap=cap, metric=metric).fit(x)
    sizes = np.bincount(model.labels_, minlength=9)
    assert sizes.max() <= math.ceil(cap * 803 / 9)
    assert sizes.sum() == 803
    assert np.array_equal(sizes, model.counts_)
    free = KMeans(9, metric=metric).fit(x)
    assert free.inertia_ <= model.inertia_ * 1.001 < 2.5 * free.inertia_
    assert (model.prices_ <= 0).all()


@pytest.mark.parametrize(("n", "k", "cap", "most"), [(100, 10, 1.1, 11), (90, 9, 1.0, 10)])
def test_a_cap_is_the_number_that_was_written(n, k, cap, most):
    """In float64 1.1 · 100 / 10 comes out above 11."""
    x = np.random.default_rng(0).normal(size=(n, 2)) * 0.1
    x[: n // 10] += 5
    model = BalancedKMeans(k, cap=cap).fit(x)
    assert model.counts_.max() == most
    assert model.counts_.sum() == n


def test_a_wide_cap_is_k_means():
    x, _ = blobs(400, 4, 5)
    start = x[:5]
    balanced = BalancedKMeans(5, cap=5.0, init=start, tol=0, max_iter=100).fit(x)
    plain = KMeans(5, init=start, tol=0, max_iter=100).fit(x)
    assert np.array_equal(balanced.labels_, plain.labels_)


def test_the_rounding_is_stable():
    """No sample and cluster would both rather have each other."""
    x = np.random.default_rng(1).normal(size=(120, 3))
    model = BalancedKMeans(7, cap=1.0, max_iter=1).fit(x)
    # Prices and centroids of the last pass made the labels.
    cost = ((x[:, None] - model.cluster_centers_) ** 2).sum(-1) - model.prices_
    own = cost[np.arange(120), model.labels_]
    sizes = np.bincount(model.labels_, minlength=7)
    dearest = np.array([own[model.labels_ == k].max() for k in range(7)])
    full = sizes >= math.ceil(120 / 7)
    wish = cost < own[:, None] - 1e-9
    assert not (wish & ~full).any()
    assert not (wish & (cost < dearest - 1e-9)).any()


def test_balanced_stops_where_centroids_hardly_move():
    x = np.random.default_rng(0).normal(size=(500, 4))
    parameters = {"init": x[:6], "max_iter": 30}
    assert BalancedKMeans(6, tol=10.0, **parameters).fit(x).n_iter_ == 1
    assert BalancedKMeans(6, tol=0.0, **parameters).fit(x).n_iter_ > 3


def test_balanced_duplicates_and_refusals():
    model = BalancedKMeans(3).fit(np.ones((10, 2)))
    assert sorted(np.bincount(model.labels_, minlength=3)) == [2, 4, 4]
    with pytest.raises(ValueError, match="cap: expected a finite number of at least 1"):
        BalancedKMeans(2, cap=0.5).fit(np.eye(4))
    with pytest.raises(ValueError, match="sample_weight: balanced"):
        BalancedKMeans(2).fit(np.eye(4), sample_weight=np.ones(4))
    with pytest.raises(ValueError, match="drift: balanced"):
        BalancedKMeans(2).fit(np.eye(4), drift=np.ones(4))
    with pytest.raises(ValueError, match="sinkhorn_iter: expected at least 0"):
        BalancedKMeans(2, sinkhorn_iter=-1).fit(np.eye(4))
    wide = [BalancedKMeans(3, cap=cap).fit(np.eye(6)).labels_ for cap in (3.0, 2.0**70, 1e308)]
    assert all(np.array_equal(wide[0], labels) for labels in wide)
    for name in ("cap", "temperature"):
        for value in ("x", None, True):
            with pytest.raises(TypeError, match=f"{name}: expected a number, got {type(value).__name__}"):
                BalancedKMeans(2, **{name: value}).fit(np.eye(4))
    with pytest.raises(NotImplementedError, match="all samples at once"):
        BalancedKMeans(2).partial_fit(np.eye(4))


# --- bisecting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["inertia", "size"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_bisecting_finds_the_clusters_and_predicts_its_labels(split, metric):
    x, truth = blobs(800, 6, 8)
    model = BisectingKMeans(8, split=split, metric=metric).fit(x)
    assert model.n_clusters_ == 8
    assert agreement(model.labels_, truth) > 0.85
    assert np.array_equal(model.predict(x), model.labels_)
    u = x if metric == "euclidean" else x / np.linalg.norm(x, axis=1, keepdims=True)
    c = model.cluster_centers_
    assert model.inertia_ == pytest.approx(((u - c[model.labels_]) ** 2).sum())
    assert model.transform(x).shape == (800, 8)


def test_bisecting_every_sample_and_samples_alike():
    x = np.random.default_rng(0).normal(size=(40, 3))
    model = BisectingKMeans(40).fit(x)
    assert sorted(model.labels_) == list(range(40))
    alike = BisectingKMeans(4).fit(np.repeat(np.eye(2), 5, axis=0))
    assert alike.n_clusters_ == 2
    with pytest.raises(ValueError, match="split: expected one of"):
        BisectingKMeans(2, split="best").fit(x)
    for tol in (math.nan, -1, math.inf):
        with pytest.raises(ValueError, match="tol: expected a finite number of at least 0"):
            BisectingKMeans(2, tol=tol).fit(x)
    with pytest.raises(TypeError, match="tol: expected a number, got NoneType"):
        BisectingKMeans(2, tol=None).fit(x)
    assert np.array_equal(
        BisectingKMeans(2, tol=2**70).fit_predict(x), BisectingKMeans(2, tol=2.0**70).fit_predict(x)
    )
    with pytest.raises(TypeError, match="sharded: expected a bool, got str"):
        BisectingKMeans(2, sharded="no").fit(x)
    with pytest.raises(RuntimeError, match="BisectingKMeans is not fitted"):
        BisectingKMeans(2).predict(x)


@pytest.mark.parametrize("split", ["inertia", "size"])
def test_bisecting_splits_the_worst_first(split):
    """No cluster that was split was better than one that is left."""
    x = np.concatenate([blobs(500, 3, 5)[0], 50 + 9 * np.random.default_rng(1).normal(size=(100, 3))])
    model = BisectingKMeans(80, split=split).fit(x)
    centers, left, number = (part.tolist() for part in model._tree)
    worth: dict[int, float] = {}
    rows = {0: np.arange(600)}
    for node in range(len(left)):  # children come after their parents
        own = x[rows[node]]
        worth[node] = len(own) if split == "size" else float(((own - centers[node]) ** 2).sum())
        if left[node] >= 0:
            far = [((own - centers[left[node] + side]) ** 2).sum(1) for side in (0, 1)]
            for side in (0, 1):
                rows[left[node] + side] = rows[node][(far[1] < far[0]) == side]
        else:
            assert set(model.labels_[rows[node]]) == {number[node]}
    inner = [worth[node] for node in range(1, len(left)) if left[node] >= 0]
    leaves = [worth[node] for node in range(len(left)) if left[node] < 0]
    assert len(leaves) == 80
    assert max(leaves) <= min(inner) * (1 + 1e-9)


def test_bisecting_many_clusters():
    """One pass for all clusters of a level: thousands of them in a moment, each the mean of its samples."""
    x = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    model = BisectingKMeans(3000, tol=0, max_iter=200).fit(x)
    assert model.n_clusters_ == 3000
    assert model.counts_.min() > 0
    sums = np.zeros((3000, 4))
    np.add.at(sums, model.labels_, x)
    np.testing.assert_allclose(model.cluster_centers_, sums / model.counts_[:, None], rtol=1e-5, atol=1e-6)
    assert np.array_equal(model.predict(x), model.labels_)
    drawn = KMeans(3000, init="random", n_init=1, max_iter=1).fit(x)
    assert model.inertia_ < drawn.inertia_history_[0]


def test_bisecting_is_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x, _ = blobs(1500, 8, 40, spread=3.0)
    ours = np.mean([BisectingKMeans(40, random_state=s).fit(x).inertia_ for s in range(6)])
    theirs = np.mean([cluster.BisectingKMeans(40, random_state=s).fit(x).inertia_ for s in range(6)])
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_bisecting_weights(metric):
    """What weighs nothing makes no cluster; the same draws under the same weights times two."""
    x, _ = blobs(400, 5, 6)
    x[7] = 0
    weights = np.random.default_rng(0).random(400)
    weights[200:] = 0
    model = BisectingKMeans(30, metric=metric).fit(x, sample_weight=weights)
    assert model.counts_.min() > 0
    assert model.counts_.sum() == pytest.approx(weights.sum() - (weights[7] if metric == "cosine" else 0))
    twice = BisectingKMeans(30, metric=metric).fit(x, sample_weight=2 * weights)
    assert np.array_equal(twice.labels_, model.labels_)
    every = BisectingKMeans(400, metric=metric).fit(x, sample_weight=weights)
    assert every.n_clusters_ == (200 if metric == "euclidean" else 199)


# --- hierarchical -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_levels_are_nested(metric):
    x, _ = blobs(900, 6, 30)
    model = HierarchicalKMeans((60, 20, 5), metric=metric, n_resampling=2).fit(x)
    assert [len(c) for c in model.levels_] == [60, 20, 5]
    for level in range(3):
        assert np.array_equal(model.predict(x, level), model.labels_of(level))
    fine, coarse = model.labels_of(0), model.labels_of(2)
    assert all(len(set(coarse[fine == k])) <= 1 for k in range(60))


def test_resampling_evens_out_a_crowd():
    """Nine tenths of the samples in a corner: plain k-means puts nine tenths of its centroids there."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 0.2, size=(3600, 2)), rng.uniform(0, 1, size=(400, 2))])

    def crowded(model: HierarchicalKMeans) -> float:
        return float((np.asarray(model.levels_[0]) < 0.2).all(1).mean())

    plain = crowded(HierarchicalKMeans((50, 5)).fit(x))
    even = crowded(HierarchicalKMeans((50, 5), n_resampling=10, members=5).fit(x))
    assert even < 0.7 * plain


def test_samples_are_even_over_clusters():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=(900, 3)), rng.normal(size=(60, 3)) + 40, rng.normal(size=(40, 3)) - 40]
    )
    model = HierarchicalKMeans((12, 3), random_state=1).fit(x)
    chosen = model.sample(150)
    assert len(set(chosen.tolist())) == 150
    sizes = np.bincount(model.labels_of(1)[chosen], minlength=3)
    assert sorted(sizes) == [40, 55, 55]
    with pytest.raises(ValueError, match="size: expected at most the 1000 samples"):
        model.sample(1001)
    with pytest.raises(ValueError, match="expected falling numbers"):
        HierarchicalKMeans((3, 5)).fit(x)
    with pytest.raises(TypeError, match="n_clusters: expected several ints, got int"):
        HierarchicalKMeans(3).fit(x)
    for ask in (lambda level: model.predict(x, level), model.labels_of):
        with pytest.raises(TypeError, match="level: expected an int, got float"):
            ask(1.5)
        with pytest.raises(ValueError, match="level: expected 0 to 1, got 2"):
            ask(2)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 200))
def test_even_shares(sizes, total):
    shares = even_shares(torch.tensor(sizes), total)
    assert int(shares.sum()) == min(total, sum(sizes))
    assert (shares <= torch.tensor(sizes)).all()
    cut = [s for s, size in zip(shares.tolist(), sizes, strict=True) if s < size]
    assert not cut or max(shares.tolist()) <= min(cut) + 1


# --- new numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [KMeans, BisectingKMeans, BalancedKMeans, HierarchicalKMeans])
def test_everything_follows_new_numbers(make):
    x = torch.from_numpy(blobs(200, 4, 5)[0])
    model = make((5, 2) if make is HierarchicalKMeans else 5).fit(x)
    labels, predicted = model.labels_, model.predict(x)
    names = torch.tensor([1, 2, 3, 4, 0])
    upper = model.labels_of(1) if make is HierarchicalKMeans else None
    prices = getattr(model, "prices_", None)
    model.rename(names)
    assert torch.equal(model.labels_, names[labels])
    assert torch.equal(model.predict(x), names[predicted])
    if upper is not None:
        assert torch.equal(model.labels_of(1), upper)
        assert torch.equal(model.levels_[0], model.cluster_centers_)
    if prices is not None:
        assert torch.equal(model.prices_[names], prices)


@pytest.mark.parametrize("make", [KMeans, BisectingKMeans, BalancedKMeans, HierarchicalKMeans])
@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (torch.tensor([0, 0, 0]), ValueError, "names: expected a permutation of 0 … 2, got 1 numbers from 0"),
        (torch.tensor([-1, 2, 1]), ValueError, "names: expected a permutation of 0 … 2, .* from -1 to 2"),
        (torch.ones(3), TypeError, "names: expected an int64 tensor, got torch.float32"),
        ([0, 1, 2], TypeError, "names: expected an int64 tensor, got list"),
        (torch.tensor([1, 0]), ValueError, r"names: expected shape \(3,\), got \(2,\)"),
    ],
)
def test_new_numbers_have_to_be_a_permutation(make, names, error, match):
    x = torch.from_numpy(blobs(100, 4, 3)[0])
    model = make((3, 2) if make is HierarchicalKMeans else 3)
    with pytest.raises(RuntimeError, match="is not fitted"):
        model.rename(torch.arange(3))
    labels = model.fit(x).labels_.clone()
    with pytest.raises(error, match=match):
        model.rename(names)
    assert torch.equal(model.labels_, labels)
    with pytest.raises(TypeError, match="rename: expected a model that was fitted on a tensor"):
        model.fit(x.numpy()).rename(torch.arange(3))


def test_batches_go_on_under_new_numbers():
    x = torch.from_numpy(blobs(200, 4, 5)[0])
    plain, renamed = (KMeans(5).partial_fit(x[:100]) for _ in range(2))
    names = torch.tensor([1, 2, 3, 4, 0])
    renamed.rename(names)
    plain.partial_fit(x[100:])
    renamed.partial_fit(x[100:])
    assert torch.equal(renamed.cluster_centers_[names], plain.cluster_centers_)
    assert torch.equal(renamed.counts_[names], plain.counts_)


# --- empty clusters, starts, bounds -------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["farthest", "split", "keep"])
@pytest.mark.parametrize("algorithm", ["lloyd", "hamerly"])
def test_empty_clusters(empty, algorithm):
    x, _ = blobs(300, 3, 6)
    start = np.concatenate([x[:3], np.full((3, 3), 1e3) + np.arange(3)[:, None]])
    model = KMeans(6, init=start, empty=empty, algorithm=algorithm)
    if empty == "keep":
        with pytest.warns(UserWarning, match="left 3 of 6 clusters empty"):
            model.fit(x)
        np.testing.assert_allclose(model.cluster_centers_[3:], start[3:])
    else:
        model.fit(x)
        assert model.counts_.min() > 0


def test_of_equally_far_samples_the_first_fill_empty_clusters():
    """Whatever else lies as far, and in whatever block or shard: `topk` takes any of equal ones."""
    x, ids = torch.arange(100.0)[:, None], torch.arange(4).repeat(25)
    sums, counts = torch.zeros(7, 1).index_add(0, ids, x).double(), torch.bincount(ids, minlength=7)
    filled, counts = fill_empty(Points(x), ids, torch.zeros(100), sums, counts.double())
    assert filled[4:].flatten().tolist() == [0, 1, 2]
    assert counts.tolist() == [24, 24, 24, 25, 1, 1, 1]


def test_the_heaviest_are_split_towards_their_farthest_sample_and_halves_in_the_next_pass():
    x = torch.tensor([[0.0, 0], [0, 4], [9, 0], [40, 0], [42, 0], [80, 0]])
    weights = torch.tensor([2.0, 2, 0, 2, 2, 1], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    centroids = torch.tensor([[0.0, 2], [41, 0], [80, 0], [7e3, 0], [8e3, 0], [9e3, 0]])
    counts = torch.bincount(ids, weights, minlength=6)
    moved = split_largest(Points(x, weights=weights), centroids, ids, counts)
    step = 2.0**-7
    halves = {0: [0, 2 + 2 * step], 3: [0, 2 - 2 * step], 1: [41 + step, 0], 4: [41 - step, 0]}
    expected = centroids.clone()  # the light one is not split, and nothing is left for the last one
    for cluster, where in halves.items():
        expected[cluster] = torch.tensor(where)
    assert torch.equal(moved, expected)


def test_splitting_fills_many_empty_clusters_as_well_as_a_good_start():
    x, _ = blobs(3000, 8, 12, spread=0.5)
    start = np.concatenate([x[:1], np.full((11, 8), 1e3) + np.arange(11)[:, None]])
    model = KMeans(12, init=start, empty="split").fit(x)
    assert model.counts_.min() > 0
    assert model.inertia_ < 1.5 * KMeans(12, n_init=5).fit(x).inertia_


def test_a_direction_that_lost_its_samples_stays_whatever_their_sum_rounds_to():
    """In float64 a sum that samples have left by turns keeps 1e-17 of them, which is no direction."""
    rng = np.random.default_rng(0)
    for turn in rng.uniform(0, 6, size=16):
        around = [np.array([-10, 0, 40, 50.0]), np.array([-30, 20, 70.0])]  # of 20° both samples leave
        x, start = (np.stack([np.cos(a), np.sin(a)], 1) for a in (np.radians(d) + turn for d in around))
        settings = {"metric": "cosine", "init": start, "empty": "keep", "tol": 0}
        with pytest.warns(UserWarning, match="left 1 of 3 clusters empty"):
            hamerly = KMeans(3, algorithm="hamerly", **settings).fit(x)
        with pytest.warns(UserWarning, match="left 1 of 3 clusters empty"):
            lloyd = KMeans(3, algorithm="lloyd", **settings).fit(x)
        np.testing.assert_allclose(hamerly.cluster_centers_, lloyd.cluster_centers_, atol=1e-12)
        np.testing.assert_allclose(hamerly.cluster_centers_[1], start[1], atol=1e-12)


@pytest.mark.filterwarnings("ignore:k-means left")
@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
def test_a_zero_vector_is_no_centroid_where_few_samples_differ(init):
    x = np.concatenate([np.zeros((40, 2)), np.eye(2).repeat(4, axis=0)])
    weights = np.r_[np.ones(40), 1, np.zeros(7)]
    for weight in (None, weights):
        for seed in range(6):
            model = KMeans(4, metric="cosine", init=init, empty="keep", warm_start=True, random_state=seed)
            model.fit(x, sample_weight=weight)
            np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1)
            model.fit(x, sample_weight=weight)


def test_the_only_sample_of_a_cluster_stays_whatever_the_weights_round_to():
    """0.6 − 0.3 − 0.2 is more than 0.1."""
    x = np.concatenate([[[1.0, 0, 0], [0, 1.1, 0], [0, 0, 1.2]], np.full((4, 3), 100.0)])
    weights = np.array([0.1, 0.2, 0.3, 1, 1, 1, 1])
    start = np.concatenate([[[0.0, 0, 0], [100, 100, 100]], np.full((3, 3), 1e3) + np.arange(3)[:, None]])
    with pytest.warns(UserWarning, match="clusters empty"):
        model = KMeans(5, init=start, max_iter=1, algorithm="lloyd").fit(x, sample_weight=weights)
    np.testing.assert_allclose(model.cluster_centers_[0], x[0], atol=1e-9)


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_every_start_gives_k_different_samples(init, metric):
    x, truth = blobs(700, 6, 12)
    model = KMeans(12, init=init, metric=metric, n_init=3, random_state=1).fit(x)
    assert model.counts_.min() > 0
    assert agreement(model.labels_, truth) > (0.7 if init == "random" else 0.9)
    weights = np.zeros(700)
    weights[:13] = 1  # no start takes what weighs nothing
    few = KMeans(12, init=init, metric=metric, max_iter=1).fit(x, sample_weight=weights)
    assert np.isin(few.counts_, [1, 2]).all()


def test_a_scalable_start_of_many_clusters():
    x = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    model = KMeans(4500, init="k-means||", max_iter=1).fit(x)
    assert model.counts_.min() > 0
    random = KMeans(4500, init="random", n_init=1, max_iter=1).fit(x)
    assert model.inertia_ < random.inertia_


shapes = st.tuples(st.integers(1, 80), st.integers(1, 6), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.integers(0, 1000),
    st.sampled_from(["euclidean", "cosine"]),
    st.sampled_from([0, -67, 67]),  # 1e-20, 1e20
    st.sampled_from([0.0, 1e4]),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:k-means left")
def test_bounds_change_no_assignment(shape, seed, metric, exponent, offset, duplicates):
    n, d, k = shape
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + offset
    if duplicates:
        x = np.round(x)  # exact ties
    x = (x * 2.0**exponent).astype(np.float32)
    k = min(k, n, int((x != 0).any(1).sum()))
    if k == 0:
        return
    start = x[(x != 0).any(1)][:k]
    plain, bounded = (
        KMeans(k, metric=metric, init=start, algorithm=a, tol=0.0, max_iter=12).fit(x)
        for a in ("lloyd", "hamerly")
    )
    assert np.array_equal(plain.labels_, bounded.labels_)
    assert bounded.n_iter_ == plain.n_iter_
    square = 1.0 if metric == "cosine" else 4.0**exponent
    assert bounded.inertia_ == pytest.approx(plain.inertia_, rel=1e-5, abs=1e-10 * square)
    assert np.isfinite(plain.cluster_centers_).all()


def test_bounds_are_used_and_spare_work(searched):
    """They come once few samples move, stay, and the search then looks at few samples."""
    x, _ = blobs(6000, 16, 60, spread=1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wscl_fast.clustering.search._LEAST_WORK", 0)  # they would not pay here
        model = KMeans(60, init=x[:60], tol=0).fit(x)
    assert searched[0] == 6000  # the first has nothing to go by
    assert len(searched) > 2  # and does not count against them
    assert min(searched[1:]) < 600
    plain = KMeans(60, init=x[:60], tol=0, algorithm="lloyd").fit(x)
    assert np.array_equal(model.labels_, plain.labels_)
    assert model.inertia_history_ == pytest.approx(plain.inertia_history_, rel=1e-12)
