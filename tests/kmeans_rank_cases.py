"""What every process of a group runs; ``tests/test_kmeans_ranks.py`` reports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from ranks import longest_with_width
from torch import Tensor

from wscl_fast import KMeans
from wscl_fast.clustering import BalancedKMeans, BisectingKMeans, ClusterScheduler, FeatureFiles, inits
from wscl_fast.clustering.inits import choose_start
from wscl_fast.clustering.points import Points, Ranks
from wscl_fast.clustering.sharded_search import ShardBounds, ShardedSearch
from wscl_fast.clustering.shards import Shards
from wscl_fast.clustering.streamed import StreamedPoints
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
    same(whole[:4].repeat(100, 1), group, n_clusters=9, init="random")  # all samples are as far


@case
def far_from_the_origin(group: Any) -> None:
    same(((data() * 64).round() / 64 + 2.0**16), group, n_clusters=8)


@case
def one_rank_with_nan_stops_all(group: Any) -> None:
    whole = data()
    whole[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        KMeans(3, sharded=True, group=group).fit(mine(whole, group))


def with_an_empty_shard(whole: Tensor, group: Any) -> Any:
    """The first rank has all rows; the others' arrays are of numpy's own dtype."""
    return whole if rank(group) == 0 else np.empty((0, whole.shape[1]))


@case
def empty_shards_of_another_dtype(group: Any) -> None:
    whole = data()
    for metric in ("euclidean", "cosine"):
        for made in (
            partial(KMeans, 5, metric=metric),
            partial(KMeans, 5, metric=metric, init="k-means||", batch_size=100),
            partial(BisectingKMeans, 5, metric=metric),
            partial(BalancedKMeans, 5, metric=metric, max_iter=2),
        ):
            model = made(sharded=True, group=group).fit(with_an_empty_shard(whole, group))
            assert len(model.labels_) == (0 if rank(group) else len(whole))
            if model.get_params().get("batch_size") is None:
                assert model.inertia_ == pytest.approx(made().fit(whole).inertia_, rel=1e-6)
    half = whole.half()
    model = KMeans(5, sharded=True, group=group, shard_centroids=True, init=whole[:5])
    model.fit(with_an_empty_shard(half, group))
    assert model.inertia_ == pytest.approx(KMeans(5, init=whole[:5]).fit(half).inertia_, rel=1e-6)


@case
def ranks_that_disagree(group: Any) -> None:
    """All of them are told."""
    whole, last = data(), rank(group) == world_size(group) - 1
    shard = whole[:50] + rank(group)
    array = whole[50:53] + 0.1 * last
    for message, x, parameters in (
        ("X: expected float64 on all ranks or on none", shard.double() if last else shard, {}),
        (r"X: expected as many features on all ranks, got \[6, .*5\]", shard[:, :5] if last else shard, {}),
        ("n_clusters: expected the same on all ranks, got [34] on this one", shard, {"n_clusters": 3 + last}),
        ("max_iter: expected the same on all ranks, got [56] on", shard, {"max_iter": 5 + last}),
        ("init: expected the same on all ranks, got arrays that differ", shard, {"init": array}),
        ("init: expected the same on all ranks", shard, {"init": whole[:3] if last else "random"}),
    ):
        with pytest.raises(ValueError, match=message):
            KMeans(**{"n_clusters": 3, **parameters}, sharded=True, group=group).fit(x)
    with pytest.raises(ValueError, match="split: expected the same"):
        BisectingKMeans(3, split="size" if last else "inertia", sharded=True, group=group).fit(shard)
    start = whole[:3].double() if last else whole[:3].numpy()  # the same numbers
    KMeans(3, init=start, sharded=True, group=group).fit(shard)


@case
def weights_that_are_zero_on_one_rank(group: Any) -> None:
    whole = data()
    share = torch.rand(len(whole), dtype=torch.float64)
    share[: round(0.7 * len(whole))] = 0
    for init in ("k-means++", "k-means||", "random"):
        same(whole, group, share, n_clusters=7, init=init)
    zero = torch.zeros(len(mine(whole, group)))
    for model in (KMeans(3, sharded=True, group=group), BisectingKMeans(3, sharded=True, group=group)):
        with pytest.raises(ValueError, match="at least one non-zero number"):
            model.fit(mine(whole, group), sample_weight=zero)


@case
def batches_of_some_ranks(group: Any) -> None:
    """A rank may have no row; a NaN on one stops all."""
    for metric in ("euclidean", "cosine"):
        alone, model = (KMeans(5, metric=metric, **p) for p in ({}, {"sharded": True, "group": group}))
        for _ in range(2):
            whole = data()
            alone.partial_fit(whole)
            model.partial_fit(with_an_empty_shard(whole, group))
            torch.testing.assert_close(torch.as_tensor(model.cluster_centers_), alone.cluster_centers_)
        for x, message in (
            (torch.full((3, 6), torch.nan if rank(group) == 0 else 1.0), "NaN"),
            (whole[:0], "at least one sample, got none"),
        ):
            with pytest.raises(ValueError, match=message):
                model.partial_fit(x)
        begun = model if rank(group) else KMeans(5, metric=metric, sharded=True, group=group)
        with pytest.raises(ValueError, match=r"n_steps_: expected the same on all ranks, got [02] on"):
            begun.partial_fit(whole)


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
def bounds_of_centroids_in_shards(group: Any) -> None:
    """They spare work and change nothing; also with fewer centroids than ranks, ties, weights."""
    whole = data(k=40)
    share = torch.rand(len(whole), dtype=torch.float64)
    searched: list[float] = []
    search = ShardBounds.search

    def counted(self: ShardBounds, centroids: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        found = search(self, centroids, assignment)
        searched.append(self.searched)
        return found

    ShardBounds.search = counted  # type: ignore[method-assign]
    try:
        same(whole, group, n_clusters=40, algorithm="hamerly", tol=0.0, shard_centroids=True)
        many = list(searched)
        fixed = {"algorithm": "hamerly", "tol": 0.0, "shard_centroids": True}
        for k in (2, 3):
            same(whole, group, n_clusters=k, init=whole[:k], **fixed)
        same(whole, group, share, n_clusters=7, init="k-means||", **fixed)
        same(whole, group, n_clusters=20, metric="cosine", **fixed)
        lattice = whole.round()
        start = torch.cat([lattice[:5], lattice[:5], lattice[5:9]])
        same(lattice, group, n_clusters=14, init=start, empty="farthest", **fixed)
        same((whole * 64).round() / 64 + 2.0**16, group, n_clusters=8, **fixed)
    finally:
        ShardBounds.search = search  # type: ignore[method-assign]
    assert many[0] == len(whole)
    assert min(many) < len(whole) / 4


class CountedFiles(FeatureFiles):
    rows_read = 0

    def read(self, start: int, stop: int) -> Tensor:
        self.rows_read += stop - start
        return super().read(start, stop)


def in_files(rows: Tensor, folder: str, block: int) -> CountedFiles:
    """Two files of a rank's rows, read `block` rows at a time."""
    for number, part in enumerate(rows.split([len(rows) // 3, len(rows) - len(rows) // 3])):
        np.save(Path(folder, f"{number}.npy"), part.numpy())
    return CountedFiles(folder, memory=4 * 4 * rows.shape[1] * block)


@case
def files_and_centroids_in_shards(group: Any) -> None:
    """Uneven blocks, a rank without rows, and every row read once a pass."""
    whole = data()
    share = torch.rand(len(whole), dtype=torch.float64)
    zero = whole.clone()
    zero[3] = 0
    for x, weights, parameters in (
        (whole, None, {"init": whole[:13]}),
        (whole, share, {"init": "k-means||"}),
        (zero, None, {"metric": "cosine"}),
        ((whole * 64).round() / 64 + 2.0**16, None, {"init": "random", "n_init": 1}),
    ):
        with TemporaryDirectory() as folder:
            files = in_files(mine(x, group), folder, 120 + 19 * rank(group))
            own = None if weights is None else mine(weights, group)
            fixed = {"n_clusters": 13, "max_iter": 5, **parameters}
            alone = KMeans(**fixed).fit(x, sample_weight=weights)
            model = KMeans(**fixed, sharded=True, group=group, shard_centroids=True)
            model.fit(files, sample_weight=own)
            labels = gather(torch.from_numpy(model.labels_), group)
            assert torch.equal(labels, alone.labels_)
            assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-6)
            assert model.n_iter_ == alone.n_iter_
            points = StreamedPoints(files, weights=own, metric=model.metric, ranks=Ranks(True, group))
            points.settle()
            shards = Shards(13, points.ranks)
            search = ShardedSearch(points, shards)
            files.rows_read = 0
            step = search(model._seen[shards.own])
            assert files.rows_read == len(files)
            assert torch.equal(gather(step.assignment, group), alone.labels_)


@case
def files_beside_memory(group: Any) -> None:
    """One rank's samples are in memory and of another width of float."""
    whole = data().bfloat16()
    start = whole[:5].float()
    alone = KMeans(5, init=start).fit(whole)
    with TemporaryDirectory() as folder:
        x: Any = mine(whole, group)
        if rank(group) == 0:
            x = in_files(x.float(), folder, 140)
        model = KMeans(5, init=start, sharded=True, group=group, shard_centroids=True).fit(x)
    assert torch.equal(gather(torch.as_tensor(model.labels_), group), alone.labels_)


@contextmanager
def many_candidates() -> Iterator[None]:
    """The second part of k-means|| goes by rounds, as for more than 4096 centroids."""
    before, inits._MOST_ONE_BY_ONE = inits._MOST_ONE_BY_ONE, 10
    try:
        yield
    finally:
        inits._MOST_ONE_BY_ONE = before


def start(points: Points, k: int, init: str, *, in_shards: bool) -> Tensor:
    return choose_start(points, k, init, torch.Generator().manual_seed(0), in_shards=in_shards)


@case
def no_rank_holds_the_whole_start(group: Any) -> None:
    k, width = 80, 37
    whole = torch.randn(1200, width)
    for init, most in (("random", k), ("k-means||", 6.5 * k)):
        made: list[Tensor] = []
        with TemporaryDirectory() as folder, many_candidates():
            want = start(Points(whole), k, init, in_shards=False)
            points = StreamedPoints(in_files(mine(whole, group), folder, 40), ranks=Ranks(True, group))
            take = partial(start, points, k, init, in_shards=True)
            longest = longest_with_width(width, lambda made=made, take=take: made.append(take()))  # type: ignore[misc]
        assert torch.equal(gather(made[0], group), want)
        assert longest <= max(40, most / world_size(group))


@case
def candidates_in_shards(group: Any) -> None:
    whole = data(n=1500, k=60)
    with many_candidates():
        want = start(Points(whole), 60, "k-means||", in_shards=False)
        points = Points(mine(whole, group), ranks=Ranks(True, group))
        got = start(points, 60, "k-means||", in_shards=True)
    assert torch.equal(gather(got, group), want)


@case
def weights_on_one_rank_only(group: Any) -> None:
    """The others' samples count once."""
    whole = data()
    share = torch.rand(len(mine(whole, group)), dtype=torch.float64) if rank(group) == 0 else None
    ones = torch.ones(len(mine(whole, group)), dtype=torch.float64)
    alone = KMeans(7, init=whole[:7]).fit(
        whole, sample_weight=gather(ones if share is None else share, group)
    )
    for shard_centroids in (False, True):
        model = KMeans(7, init=whole[:7], sharded=True, group=group, shard_centroids=shard_centroids)
        model.fit(mine(whole, group), sample_weight=share)
        assert torch.equal(gather(model.labels_, group), alone.labels_)


@case
def scheduler_shares_the_work(group: Any) -> None:
    whole = data()
    order = torch.randperm(len(whole))
    samples = mine(order, group)
    for shard_centroids in (False, True):
        alone = ClusterScheduler((30, 8), nested=True)
        together = ClusterScheduler(
            (30, 8), nested=True, sharded=True, group=group, shard_centroids=shard_centroids
        )
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
def scheduler_with_empty_shards(group: Any) -> None:
    """One rank has all samples, the others none in another dtype; or none has any."""
    whole, numbers = data(), torch.arange(900)
    alone, together = ClusterScheduler(8), ClusterScheduler(8, sharded=True, group=group)
    with pytest.raises(ValueError, match="features: expected at least one sample, got none"):
        together.step(whole[:0], numbers[:0])
    for _ in range(2):
        x = torch.as_tensor(with_an_empty_shard(whole, group))
        got = together.step(x, numbers[: len(x)])
        assert torch.equal(got[0].clusters, alone.step(whole)[0].clusters)
        whole = whole.flip(1)


@case
def balanced(group: Any) -> None:
    whole = data(n=300)
    alone = BalancedKMeans(7, max_iter=3).fit(whole)
    model = BalancedKMeans(7, max_iter=3, sharded=True, group=group).fit(mine(whole, group))
    assert torch.equal(gather(model.labels_, group), alone.labels_)
    assert torch.equal(model.counts_, alone.counts_)


@case
def bisecting(group: Any) -> None:
    whole = data(n=700)
    whole[3] = 0
    share = torch.rand(len(whole), dtype=torch.float64)
    for metric, weights, split in (
        ("euclidean", None, "inertia"),
        ("cosine", None, "size"),
        ("euclidean", share, "size"),
    ):
        parameters = {"metric": metric, "split": split}
        alone = BisectingKMeans(23, **parameters).fit(whole, sample_weight=weights)
        own = None if weights is None else mine(weights, group)
        model = BisectingKMeans(23, **parameters, sharded=True, group=group)
        model.fit(mine(whole, group), sample_weight=own)
        assert torch.equal(gather(model.labels_, group), alone.labels_)
        torch.testing.assert_close(model.cluster_centers_, alone.cluster_centers_, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.counts_, alone.counts_)
        assert model.inertia_ == pytest.approx(alone.inertia_, rel=1e-6)
        assert torch.equal(model.predict(whole), alone.predict(whole))


@case
def mini_batches_on_all_ranks(group: Any) -> None:
    whole = data()
    model = KMeans(12, batch_size=96, sharded=True, group=group).fit(mine(whole, group))
    centers = gather(model.cluster_centers_[None], group)
    assert torch.equal(centers, centers[:1].expand_as(centers))
    assert len(model.labels_) == len(mine(whole, group))
    assert model.inertia_ <= 1.1 * KMeans(12).fit(whole).inertia_


@case
def mini_batches_of_files_on_all_ranks(group: Any) -> None:
    """As many on every rank, wherever blocks end."""
    whole = data()
    with TemporaryDirectory() as folder:
        files = in_files(mine(whole, group), folder, 31 + 9 * rank(group))
        model = KMeans(12, batch_size=120, max_iter=4, sharded=True, group=group).fit(files)
    centers = gather(torch.from_numpy(model.cluster_centers_)[None], group)
    assert torch.equal(centers, centers[:1].expand_as(centers))
    assert len(model.labels_) == len(mine(whole, group))
