"""What every process of a group runs; ``tests/test_kmeans_ranks.py`` reports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wscl_fast import KMeans
from wscl_fast.clustering import BalancedKMeans, ClusterScheduler
from wscl_fast.distributed import gather, rank, world_size

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
    alone = KMeans(**parameters).fit(whole, sample_weight=weights)
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
