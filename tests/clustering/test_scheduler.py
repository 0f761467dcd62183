from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from wscl_fast import ClusterQueue
from wscl_fast.clustering import ClusterScheduler, match_clusters
from wscl_fast.clustering.matching import assignment_of_least_cost
from wscl_fast.clustering.scheduler import normalised_information
from wscl_fast.data.sampler import ClusterBatchSampler, anchor_share


def blobs(n: int, d: int, k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(k, (n,), generator=generator)
    centres = 5 * torch.randn(k, d, generator=generator)
    return centres[truth] + torch.randn(n, d, generator=generator), truth


def turned(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """The same clusters in another place: what an epoch of training does to features."""
    q, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(seed)))
    return x @ q


# --- matching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_least_cost_is_scipys(n):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(n)
    for cost in (rng.normal(size=(n, n)), rng.integers(0, 4, size=(n, n)).astype(float), np.zeros((n, n))):
        ours = assignment_of_least_cost(cost)
        assert sorted(ours) == list(range(n))
        rows, columns = optimize.linear_sum_assignment(cost)
        assert cost[np.arange(n), ours].sum() == pytest.approx(cost[rows, columns].sum())


@pytest.mark.parametrize("exact", [True, False])
def test_matching_undoes_a_permutation(exact):
    generator = torch.Generator().manual_seed(0)
    old = torch.randint(50, (2000,), generator=generator)
    permutation = torch.randperm(50, generator=generator)
    new = permutation[old]
    new[:300] = torch.randint(50, (300,), generator=generator)
    old[300:310] = -1
    names = match_clusters(old, new, 50, exact=exact)
    assert torch.equal(names[permutation], torch.arange(50))


def test_matching_names_clusters_without_overlap_too():
    names = match_clusters(torch.tensor([0, 0, 1]), torch.tensor([3, 3, 3]), 4)
    assert sorted(names.tolist()) == [0, 1, 2, 3]
    assert names[3] == 0


def test_matching_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="new: expected shape"):
        match_clusters(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="old: expected ids below n_clusters = 2, got 5"):
        match_clusters(torch.tensor([5]), torch.tensor([0]), 2)
    ids = torch.tensor([0, 1])
    for name, arguments in (("old", ([0, 1], ids)), ("new", (ids, ids.numpy()))):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got"):
            match_clusters(*arguments, 2)
    with pytest.raises(TypeError, match=r"new: expected integers, got torch\.float32"):
        match_clusters(ids, ids.float(), 2)
    with pytest.raises(ValueError, match="n_clusters: expected at least 1, got 0"):
        match_clusters(ids[:0], ids[:0], 0)
    with pytest.raises(TypeError, match="n_clusters: expected an int, got float"):
        match_clusters(ids, ids, 2.0)
    with pytest.raises(TypeError, match="exact: expected a bool, got str"):
        match_clusters(ids, ids, 2, exact="no")
    with pytest.raises(ValueError, match="new: expected device cpu as old, got meta"):
        match_clusters(ids, ids.to("meta"), 2)


def test_normalised_information_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = torch.randint(5, (300,)), torch.randint(7, (300,))
    b[:150] = a[:150]
    expected = metrics.normalized_mutual_info_score(a.numpy(), b.numpy())
    assert normalised_information(a, b) == pytest.approx(expected)
    assert normalised_information(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) == 1


# --- the scheduler ------------------------------------------------------------------------------------


def test_is_due_every_few_epochs_after_the_warm_up():
    scheduler = ClusterScheduler(3, every=3, warmup=2)
    assert [epoch for epoch in range(10) if scheduler.due(epoch)] == [2, 5, 8]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ids_stay_while_features_turn(metric):
    x, truth = blobs(600, 8, 10)
    scheduler = ClusterScheduler((10, 25), metric=metric, init="k-means||")
    first = scheduler.step(x)
    assert [found.moved for found in first] == [None, None]
    assert normalised_information(truth, first[0].clusters) > 0.9
    second = scheduler.step(turned(x))
    assert [found.moved for found in second] == [0, 0]
    assert [found.nmi for found in second] == [1, 1]
    assert torch.equal(first[0].clusters, second[0].clusters)
    assert torch.equal(scheduler.clusters_, torch.stack([found.clusters for found in second]))


def test_statistics_tell_how_much_moved():
    x, _ = blobs(500, 6, 8)
    scheduler = ClusterScheduler(8)
    before = scheduler.step(x)[0]
    moved = x.clone()
    moved[:50] = x[450:]
    after = scheduler.step(moved)[0]
    share = float((before.clusters != after.clusters).double().mean())
    assert after.moved == pytest.approx(share)
    assert 0 < share < 0.12
    assert after.nmi is not None
    assert after.nmi < 1


def test_a_new_start_keeps_the_names():
    """Whatever k-means does to the numbers, most samples keep theirs."""
    x, _ = blobs(400, 6, 7)
    scheduler = ClusterScheduler(7, random_state=3)
    first = scheduler.step(x)[0]
    scheduler.models[0].rename(torch.arange(7).roll(1))  # as if the numbers had been dealt anew
    scheduler.clusters_ = scheduler.clusters_.clone()
    model = scheduler.models[0]
    named = scheduler._named(model, 0, model.labels_)
    assert torch.equal(named.clusters, first.clusters)
    torch.testing.assert_close(named.centroids, first.centroids)


def test_nested_levels():
    x, _ = blobs(600, 8, 12)
    scheduler = ClusterScheduler((40, 12, 4), nested=True)
    for features in (x, turned(x)):
        levels = scheduler.step(features)
        for fine, coarse in itertools.pairwise(levels):
            parents = [set(coarse.clusters[fine.clusters == k].tolist()) for k in range(len(fine.centroids))]
            assert max(map(len, parents)) == 1
        assert [len(found.centroids) for found in levels] == [40, 12, 4]
    assert [found.moved for found in levels] == [0, 0, 0]  # the upper ones turn along


@pytest.mark.parametrize("broken", [math.nan, 0.0])  # the first level refuses it, or the last one alone
def test_a_refused_step_leaves_the_models_as_they_were(broken):
    x, _ = blobs(200, 8, 6)
    scheduler = ClusterScheduler((4, 8))
    features = x.clone()
    features[6:] = broken
    with pytest.raises(ValueError, match=r"NaN|at most the 6 samples"):
        scheduler.step(features)
    assert not any(hasattr(model, "cluster_centers_") for model in scheduler.models)
    before = scheduler.step(x)
    with pytest.raises(ValueError, match=r"NaN|at most the 6 samples"):
        scheduler.step(features)
    for model, found in zip(scheduler.models, before, strict=True):
        assert torch.equal(model.predict(x), found.clusters)
    assert [found.moved for found in scheduler.step(x)] == [0, 0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_carried_bounds_change_nothing(metric):
    x, _ = blobs(1500, 8, 40)
    generator = torch.Generator().manual_seed(5)
    make = {"metric": metric, "algorithm": "hamerly", "tol": 0.0}
    plain, carrying = ClusterScheduler(40, **make), ClusterScheduler(40, carry_bounds=True, **make)
    for _ in range(3):
        a, b = plain.step(x)[0], carrying.step(x)[0]
        assert torch.equal(a.clusters, b.clusters)
        assert a.inertia == pytest.approx(b.inertia, rel=1e-9)
        x = x + 0.02 * torch.randn(x.shape, generator=generator)


def test_carried_bounds_spare_work(searched):
    """Features that moved a little: a later clustering begins with few samples that have to be searched."""
    x, _ = blobs(3000, 8, 40)
    scheduler = ClusterScheduler(40, metric="euclidean", algorithm="hamerly", carry_bounds=True, tol=0.0)
    scheduler.step(x)
    searched.clear()
    moved = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    scheduler.step(moved)
    assert max(searched) < 300


def test_carried_bounds_of_features_that_are_renewed_in_place():
    x = torch.cat([torch.randn(100, 1) * 0.1, torch.randn(100, 1) * 0.1 + 2, torch.tensor([[-3.0]])])
    x.requires_grad_()
    start = torch.tensor([[0.0], [2.0]])
    scheduler = ClusterScheduler(2, carry_bounds=True, metric="euclidean", init=start, algorithm="hamerly")
    assert scheduler.step(x)[0].clusters[-1] == 0
    with torch.no_grad():
        x[-1] = 1.6
    assert scheduler.step(x)[0].clusters[-1] == 1
    assert not scheduler._last[0].requires_grad


def test_carried_bounds_of_another_dtype_are_left_out():
    x, _ = blobs(200, 4, 5)
    scheduler = ClusterScheduler(5, carry_bounds=True, algorithm="hamerly")
    first = scheduler.step(x)[0]
    assert torch.equal(scheduler.step(x.double())[0].clusters, first.clusters)


def test_targets_are_told():
    x, _ = blobs(300, 6, 5)
    queue = ClusterQueue(64, 6)
    queue.enqueue(x[:64], torch.zeros(64, dtype=torch.int64), torch.arange(64))
    scheduler = ClusterScheduler((20, 5))
    levels = scheduler.step(x, targets=[queue], level=0)
    assert torch.equal(queue.clusters, levels[0].clusters[queue.samples])


def test_the_sampler_draws_by_the_new_ids():
    x, _ = blobs(300, 6, 5)
    sampler = ClusterBatchSampler(np.full(300, -1), 30, samples_per_cluster=5)
    scheduler = ClusterScheduler(5)
    clusters = scheduler.step(x, targets=[sampler])[0].clusters.numpy()
    assert np.array_equal(sampler.clusters, clusters)
    assert np.mean([anchor_share(clusters[batch]) for batch in sampler.batches(0)]) > 0.99
    with pytest.raises(ValueError, match="one id a sample"):
        sampler.refresh(torch.zeros(299, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected integers"):
        sampler.refresh(torch.zeros(300))
    with pytest.raises(ValueError, match="ids from −1"):
        sampler.refresh(torch.full((300,), -2))


def test_goes_on_from_its_state():
    x, _ = blobs(400, 6, 7)
    one, other = ClusterScheduler((7, 15)), ClusterScheduler((7, 15))
    other.load_state_dict(other.state_dict())
    one.step(x)
    other.load_state_dict(one.state_dict())
    moved = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(one.step(moved), other.step(moved), strict=True):
        assert torch.equal(a.clusters, b.clusters)
        assert a.moved == b.moved
    with pytest.raises(ValueError, match=r"state: expected clusters \[3\], got \[7, 15\]"):
        ClusterScheduler(3).load_state_dict(one.state_dict())


def test_a_state_is_all_there_is():
    """What was found before is forgotten, models predict, and no memory is shared."""
    x = blobs(400, 6, 7)[0] * 1e20 + 1e23  # far out, as a frame of its own sees it
    one, other = (ClusterScheduler((7, 15), metric="euclidean", carry_bounds=True) for _ in range(2))
    empty = other.state_dict()
    one.step(x)
    other.step(x.flip(0))
    state = one.state_dict()
    other.load_state_dict(state)
    state["clusters"].fill_(-5)
    state["centroids"][0].fill_(0)
    for model, loaded in zip(one.models, other.models, strict=True):
        assert torch.equal(model.predict(x), loaded.predict(x))
    for a, b in zip(one.step(2 * x), other.step(2 * x), strict=True):
        assert torch.equal(a.clusters, b.clusters)
        assert a.moved == b.moved
    other.load_state_dict(empty)
    assert other.state_dict() == {}
    assert other.step(x)[0].moved is None


def test_a_state_without_frames():
    x, _ = blobs(400, 6, 7)
    one, other = ClusterScheduler(7), ClusterScheduler(7)
    one.step(x)
    state = one.state_dict()
    del state["frames"]
    other.load_state_dict(state)
    assert torch.equal(one.models[0].predict(x), other.models[0].predict(x))


def test_refusals():
    with pytest.raises(ValueError, match="expected falling numbers"):
        ClusterScheduler((5, 10), nested=True)
    with pytest.raises(ValueError, match="at least one number"):
        ClusterScheduler([])
    with pytest.raises(ValueError, match=r"samples: expected int64 \[4\]"):
        ClusterScheduler(2).step(torch.randn(4, 3), torch.arange(3))
    with pytest.raises(ValueError, match="features: expected at least one sample, got none"):
        ClusterScheduler(2).step(torch.randn(0, 3))
    stepped = ClusterScheduler(2)
    stepped.step(torch.randn(4, 3))
    with pytest.raises(ValueError, match="features: expected 3 columns as in the last step, got 5"):
        stepped.step(torch.randn(4, 5))
    with pytest.raises(ValueError, match="samples: expected numbers from 0 to n_samples − 1 = 2"):
        ClusterScheduler(2).step(torch.randn(4, 3), n_samples=3)


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        ({"features": np.zeros((4, 3))}, TypeError, "features: expected a tensor, got ndarray"),
        ({"features": torch.zeros(4)}, ValueError, r"features: expected a matrix \[n, d\], got shape \(4,\)"),
        ({"features": torch.zeros(0, 3)}, ValueError, "features: expected at least one sample, got none"),
        ({"samples": np.arange(4)}, TypeError, "samples: expected a tensor, got ndarray"),
        ({"samples": torch.tensor([0, 1, 2, 0])}, ValueError, "samples: expected each sample once on a rank"),
        ({"n_samples": "x"}, TypeError, "n_samples: expected an int, got str"),
        ({"level": 5}, ValueError, "level: expected -1 to 0, got 5"),
        ({"targets": ClusterQueue(4, 3)}, TypeError, "targets: expected a sequence of targets, got ClusterQ"),
        ({"targets": [3]}, TypeError, r"targets\[0\]: expected a `refresh`, got int"),
    ],
)
def test_a_step_that_cannot_work_is_refused_before_the_clustering(step, error, match):
    scheduler = ClusterScheduler(2)
    with pytest.raises(error, match=match):
        scheduler.step(**{"features": torch.randn(4, 3), **step})
    assert scheduler.state_dict() == {}
    assert not hasattr(scheduler.models[0], "labels_")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ClusterScheduler(2).due("x"), TypeError, "epoch: expected an int, got str"),
        (lambda: ClusterScheduler(2).load_state_dict(5), TypeError, "state: expected a mapping, got int"),
        (lambda: ClusterScheduler(2).load_state_dict({"clusters": 1}), ValueError, "an entry 'centroids'"),
        (lambda: ClusterScheduler((4, 2), nested="no"), TypeError, "nested: expected a bool, got str"),
        (lambda: ClusterScheduler(2, carry_bounds=1), TypeError, "carry_bounds: expected a bool, got int"),
        (lambda: ClusterScheduler(2, sharded=None), TypeError, "sharded: expected a bool, got NoneType"),
        (lambda: ClusterScheduler(2, warm_start=False), TypeError, "parameters: expected .*, got warm_start"),
        (lambda: ClusterScheduler(2, foo=1), TypeError, "parameters: expected ones of .*max_iter.*, got foo"),
    ],
)
def test_errors_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()
