"""What every process of a group runs; ``tests/test_kmeans_ranks.py`` reports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import longest_with_width
from torch import Tensor

from wscl_fast import KMeans
from wscl_fast.clustering import BalancedKMeans, ClusterScheduler
from wscl_fast.clustering.points import Points, Ranks
from wscl_fast.clustering.shards import ShardedSearch, Shards
from wscl_fast.distributed import gather, rank, world_size
from wscl_fast.functional import kmeans_update

CASES = {}


def case(function):  # type: ignore[no-untyped-def]
    CASES[function.__name__] = function
    return function


def data(n: int = 900, d: int = 6, k: int = 12) -> Tensor:
    centres = 3 * torch.randn(k, d)
    return (centres[torch.randint(k, (n,))] + torch.randn(n, d)).float()


def mine(whole: Tensor, group: Any) -> Tensor:
    """Uneven shards; the last of several has no row."""
    cuts = {2: [0.7, 0.3], 3: [0.5, 0.5, 0], 4: [0.2, 0.5, 0.3, 0]}[world_size(group)]
    rows = [round(len(whole) * share) for share in cuts]
    return whole.split(rows)[rank(group)]


def same(whole: Tensor, group: Any, weights: Tensor | None = None, **parameters: Any) -> None:
    """All processes on their shards find what this process finds alone on the union."""
    alone = KMeans(**{**parameters, "shard_centroids": False}).fit(whole, sample_weight=weights)
    share = None if weights is None else mine(weights, group)
    model = KMeans(**parameters, sharded=True, group=group).fit(mine(whole, group), sample_weight=share)
    labels = gather(model.labels_, group)
    assert torch.equal(labels, alone.labels_)
    assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-6)
    torch.testing.assert_close(model.cluster_centers_, alone.cluster_centers_, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.counts_, alone.counts_) or weights is not None
    assert model.n_iter_ == alone.n_iter_


@case
def every_start(group: Any) -> None:
    whole = data()
    for init in ("k-means++", "k-means||", "random"):
        same(whole, group, n_clusters=12, init=init, n_init=2)
    same(whole, group, n_clusters=12, init=whole[:12])


@case
def cosine_with_zero_vectors_on_one_rank(group: Any) -> None:
    whole = data()
    whole[3] = 0
    same(whole, group, n_clusters=9, metric="cosine")


@case
def weights(group: Any) -> None:
    whole = data()
    same(whole, group, torch.rand(len(whole), dtype=torch.float64), n_clusters=7, init="k-means||")


@case
def bounds(group: Any) -> None:
    same(data(k=40), group, n_clusters=40, algorithm="hamerly", tol=0.0)


@case
def empty_clusters(group: Any) -> None:
    whole = data()
    start = torch.cat([whole[:4], torch.full((3, 6), 1e3) + torch.arange(3.0)[:, None]])
    for empty in ("farthest", "split"):
        same(whole, group, n_clusters=7, init=start, empty=empty)


@case
def far_from_the_origin(group: Any) -> None:
    same(((data() * 64).round() / 64 + 2.0**16), group, n_clusters=8)


@case
def one_rank_with_nan_stops_all(group: Any) -> None:
    whole = data()
    whole[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        KMeans(3, sharded=True, group=group).fit(mine(whole, group))


@case
def centroids_in_shards(group: Any) -> None:
    """Cut among the ranks, with fewer centroids than ranks too."""
    whole = data()
    share = torch.rand(len(whole), dtype=torch.float64)
    for k in (13, 3, 1):
        same(whole, group, n_clusters=k, init=whole[:k], shard_centroids=True)
    same(whole, group, share, n_clusters=7, init="k-means||", shard_centroids=True)
    whole[3] = 0
    same(whole, group, n_clusters=9, metric="cosine", n_init=2, shard_centroids=True)


@case
def centroids_in_shards_and_equal_distances(group: Any) -> None:
    """The lowest index wins over all shards: centroids twice, and samples on a lattice half way between."""
    whole = data().round()
    start = torch.cat([whole[:5], whole[:5], whole[5:9]])
    same(whole, group, n_clusters=14, init=start, empty="keep", shard_centroids=True)
    same(whole, group, n_clusters=14, init=start, empty="farthest", max_iter=4, shard_centroids=True)
    points = Points(mine(whole, group), ranks=Ranks(True, group))
    shards = Shards(14, points.ranks)
    step = ShardedSearch(points, shards)(start[shards.own])
    assert torch.equal(gather(step.assignment, group), kmeans_update(whole, start).assignment)
    assert not step.counts[5:10].any()


@case
def centroids_in_shards_far_from_the_origin(group: Any) -> None:
    whole = (data() * 64).round() / 64 + 2.0**16
    same(whole, group, n_clusters=8, init="random", n_init=3, shard_centroids=True)


@case
def no_rank_holds_all_centroids(group: Any) -> None:
    """What a pass makes of K rows is a shard long at most."""
    k, width = 40, 37
    whole = torch.randn(300, width)
    points = Points(mine(whole, group), ranks=Ranks(True, group))
    shards = Shards(k, points.ranks)
    search = ShardedSearch(points, shards)
    own = whole[shards.own].clone()
    rows = len(points.x)
    longest = longest_with_width(width, lambda: search(own))
    assert longest <= max(rows, max(shards.sizes))
    step = search(own)
    want = kmeans_update(whole, whole[:k])
    assert torch.equal(gather(step.assignment, group), want.assignment)
    torch.testing.assert_close(shards.whole(step.sums), want.sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(step.counts, want.counts)
    assert step.inertia == pytest.approx(float(want.inertia), rel=1e-6)


@case
def scheduler_shares_the_work(group: Any) -> None:
    whole = data()
    order = torch.randperm(len(whole))
    alone = ClusterScheduler((30, 8), nested=True)
    together = ClusterScheduler((30, 8), nested=True, sharded=True, group=group)
    samples = mine(order, group)
    for epoch in range(2):
        features = whole + 0.3 * epoch * torch.randn(
            whole.shape, generator=torch.Generator().manual_seed(epoch)
        )
        # In the order in which the ranks have them, so that a seed draws the same samples.
        want = alone.step(features[order], order)
        got = together.step(features[samples], samples)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.clusters, theirs.clusters)
            assert ours.moved == theirs.moved


@case
def balanced(group: Any) -> None:
    whole = data(n=300)
    alone = BalancedKMeans(7, max_iter=3).fit(whole)
    model = BalancedKMeans(7, max_iter=3, sharded=True, group=group).fit(mine(whole, group))
    assert torch.equal(gather(model.labels_, group), alone.labels_)
    assert torch.equal(model.counts_, alone.counts_)


@case
def mini_batches_on_all_ranks(group: Any) -> None:
    whole = data()
    model = KMeans(12, batch_size=96, sharded=True, group=group).fit(mine(whole, group))
    centers = gather(model.cluster_centers_[None], group)
    assert torch.equal(centers, centers[:1].expand_as(centers))
    assert len(model.labels_) == len(mine(whole, group))
    assert model.inertia_ <= 1.1 * KMeans(12).fit(whole).inertia_
