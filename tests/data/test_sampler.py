"""Every sample once, clusters together, the same batches for the same (seed, epoch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wscl_fast.data import ClusterBatchSampler, anchor_share

CLUSTERS = np.random.default_rng(0).integers(-1, 400, 5000)


def _epoch(sampler: ClusterBatchSampler, epoch: int = 0) -> list[np.ndarray]:
    return list(sampler.batches(epoch))


@pytest.mark.parametrize("samples_per_cluster", [1, 2, 3, 8])
@pytest.mark.parametrize("drop_last", [True, False])
def test_each_sample_once(samples_per_cluster: int, drop_last: bool) -> None:
    sampler = ClusterBatchSampler(CLUSTERS, 256, samples_per_cluster=samples_per_cluster, drop_last=drop_last)
    batches = _epoch(sampler)
    drawn = np.concatenate(batches)
    assert len(batches) == len(sampler) == (19 if drop_last else 20)
    assert all(len(batch) == 256 for batch in batches[:-1])
    assert np.unique(drawn).size == drawn.size == (19 * 256 if drop_last else 5000)
    assert drawn.dtype == np.int64


def test_deterministic_in_seed_and_epoch() -> None:
    first, again = (np.concatenate(_epoch(ClusterBatchSampler(CLUSTERS, 64, seed=7), 3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.concatenate(_epoch(ClusterBatchSampler(CLUSTERS, 64, seed=7), 4)))
    assert not np.array_equal(first, np.concatenate(_epoch(ClusterBatchSampler(CLUSTERS, 64, seed=8), 3)))


def test_dropped_samples_differ_between_epochs() -> None:
    sampler = ClusterBatchSampler(CLUSTERS, 256)
    dropped = [set(range(5000)) - set(np.concatenate(_epoch(sampler, epoch)).tolist()) for epoch in range(2)]
    assert dropped[0] != dropped[1]
    assert len(dropped[0]) == 5000 - 19 * 256


def test_clusters_come_together() -> None:
    """Anchors find positives by construction, which uniform batches leave to luck."""
    shares = {
        n: np.mean(
            [
                anchor_share(CLUSTERS[b])
                for b in _epoch(ClusterBatchSampler(CLUSTERS, 64, samples_per_cluster=n))
            ]
        )
        for n in (1, 2, 4)
    }
    assert shares[1] < 0.25
    assert shares[2] > 0.95
    assert shares[4] > 0.95


def test_remainders_are_not_left_alone() -> None:
    clusters = np.repeat(np.arange(50), 3)  # threes drawn in pairs: no single is left over
    batch = _epoch(ClusterBatchSampler(clusters, 150))[0]
    assert np.array_equal(clusters[batch].reshape(50, 3), np.sort(clusters[batch].reshape(50, 3)))
    assert (np.diff(clusters[batch].reshape(50, 3)) == 0).all()


def test_group_sizes() -> None:
    clusters = np.repeat(np.arange(40), 7)
    line = clusters[np.concatenate(_epoch(ClusterBatchSampler(clusters, 280, samples_per_cluster=3)))]
    runs = np.diff(np.flatnonzero(np.diff(line, prepend=-1)), append=line.size)
    assert runs.min() >= 3


def test_samples_without_cluster_are_spread() -> None:
    clusters = np.full(1000, -1)
    order = np.concatenate(_epoch(ClusterBatchSampler(clusters, 100)))
    assert not np.array_equal(order, np.arange(1000))
    assert np.abs(np.diff(order)).mean() > 200


def test_uniform_is_a_plain_shuffle() -> None:
    sampler = ClusterBatchSampler(CLUSTERS, 5000, samples_per_cluster=1, seed=3)
    assert np.array_equal(_epoch(sampler, 2)[0], np.random.default_rng([3, 2]).permutation(5000))


@pytest.mark.parametrize(
    ("clusters", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 1, 2, 3], 0.5), ([-1, -1, 2, 2], 0.5), ([5, 5, 5], 1.0)],
)
def test_anchor_share(clusters: list[int], share: float) -> None:
    assert anchor_share(np.array(clusters, dtype=np.int64)) == share


@pytest.mark.parametrize(
    ("clusters", "error"),
    [
        (np.zeros((2, 2), dtype=np.int64), ValueError),
        (np.zeros(3), TypeError),
        (np.full(3, np.nan), TypeError),
        ("ab", TypeError),
    ],
)
def test_anchor_share_takes_one_id_a_sample(clusters: Any, error: type[Exception]) -> None:
    assert anchor_share([]) == 0.0  # type: ignore[arg-type]
    with pytest.raises(error, match="clusters_in_batch: expected"):
        anchor_share(clusters)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), ("0", TypeError)])
def test_wrong_epochs(epoch: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="epoch: expected"):
        _epoch(ClusterBatchSampler(CLUSTERS, 64), epoch)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clusters": np.zeros(9)}, TypeError, "clusters: expected integers"),
        ({"clusters": np.zeros((3, 3), dtype=np.int64)}, ValueError, "clusters: expected one dimension"),
        ({"clusters": np.array([0, -2, 1])}, ValueError, "clusters: expected ids from"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 10}, ValueError, "batch_size: 10 is more than the 9 samples"),
        ({"samples_per_cluster": 0}, ValueError, "samples_per_cluster"),
        ({"samples_per_cluster": 5}, ValueError, "samples_per_cluster: expected 1 to batch_size = 4"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": None}, TypeError, "seed: expected an int, got NoneType"),
        ({"batch_size": "4"}, TypeError, "batch_size: expected an int, got str"),
        ({"batch_size": 3.0}, TypeError, "batch_size: expected an int, got float"),
        ({"samples_per_cluster": 1.5}, TypeError, "samples_per_cluster: expected an int, got float"),
        ({"drop_last": "no"}, TypeError, "drop_last: expected a bool, got str"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClusterBatchSampler(**({"clusters": np.zeros(9, dtype=np.int64), "batch_size": 4} | arguments))  # type: ignore[arg-type]
