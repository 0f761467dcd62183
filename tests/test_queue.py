"""The memory queue: the ring, its ids when the clustering changes, checkpoints, the loss over it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from wscl_fast import ClusteredInfoNCE, ClusterQueue, clustered_infonce


class Record:
    """The definition: every key ever enqueued, in order, in Python lists."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.Tensor, int, int]] = []

    def add(self, keys: torch.Tensor, clusters: torch.Tensor, samples: torch.Tensor) -> None:
        self.entries += zip(keys, clusters.tolist(), samples.tolist(), strict=True)

    def assert_is(self, queue: ClusterQueue) -> None:
        """Slot by slot: entry number i lies in slot i modulo the size unless a later one does."""
        slots = {i % queue.size: entry for i, entry in enumerate(self.entries)}
        assert queue.filled == len(slots)
        for slot in range(queue.size):
            key, cluster, sample = slots.get(slot, (torch.zeros(queue.dim), -1, -1))
            torch.testing.assert_close(queue.keys[slot], key.to(queue.keys), rtol=0, atol=0)
            assert (int(queue.clusters[slot]), int(queue.samples[slot])) == (cluster, sample)


def batch(size: int, dim: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(size, dim), torch.randint(-1, 4, (size,)), torch.randint(0, 50, (size,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3, 3], [10], [10, 1], [4, 0, 23, 5], [9, 2], [21, 40]])
def test_the_newest_keys_stay(sizes: list[int], dtype: torch.dtype) -> None:
    queue, record = ClusterQueue(10, 3, dtype=dtype), Record()
    record.assert_is(queue)
    for size in sizes:
        entries = batch(size)
        queue.enqueue(*entries)
        record.add(*entries)
        record.assert_is(queue)
    assert queue.keys.dtype == dtype
    queue.clear()
    Record().assert_is(queue)


def test_empty_slots_are_no_ones_negatives() -> None:
    features, clusters = torch.randn(6, 2, 8), torch.tensor([0, 1, 2, 0, 1, -1])
    queue, loss_fn = ClusterQueue(64, 8), ClusteredInfoNCE(0.2)
    keys, key_clusters = torch.randn(20, 8), torch.randint(0, 3, (20,))
    queue.enqueue(keys, key_clusters)
    loss = loss_fn(features, clusters, keys=queue.keys, key_clusters=queue.clusters)
    torch.testing.assert_close(loss, loss_fn(features, clusters, keys=keys, key_clusters=key_clusters))
    queue.clear()
    with pytest.warns(UserWarning, match="no query of this batch had a positive"):
        assert loss_fn(features, clusters, keys=queue.keys, key_clusters=queue.clusters) == 0


def test_another_ignore_index() -> None:
    queue = ClusterQueue(8, 4, ignore_index=-100)
    queue.enqueue(torch.randn(5, 4), torch.tensor([-1, -1, 2, 2, 3]))
    queries, ids = torch.randn(4, 4), torch.tensor([-1, 2, 3, 3])
    loss = clustered_infonce(
        queries, queue.keys, query_clusters=ids, key_clusters=queue.clusters, ignore_index=-100
    )
    want = clustered_infonce(
        queries, queue.keys[:5], query_clusters=ids + 1, key_clusters=queue.clusters[:5] + 1
    )
    torch.testing.assert_close(loss, want)


def test_a_new_clustering_reaches_every_key() -> None:
    """Without the refresh the old ids would count: the loss under them is another."""
    features, samples = normalize(torch.randn(40, 8), dim=1), torch.randperm(40)
    before, after = torch.randint(0, 4, (40,)), torch.randint(0, 4, (40,))
    queue = ClusterQueue(64, 8)
    queue.enqueue(features, before[samples], samples)

    def loss() -> torch.Tensor:
        return clustered_infonce(
            features, queue.keys, query_clusters=after[samples], key_clusters=queue.clusters
        )

    stale = loss()
    queue.refresh(after)
    assert queue.clusters[:40].equal(after[samples])
    assert (queue.clusters[40:] == -1).all()
    torch.testing.assert_close(loss(), clustered_infonce(features, features, query_clusters=after[samples]))
    assert not torch.isclose(loss(), stale)


def test_keys_whose_sample_is_unknown_lose_their_id() -> None:
    queue = ClusterQueue(6, 2)
    queue.enqueue(torch.randn(3, 2), torch.tensor([5, 6, 7]))
    queue.enqueue(torch.randn(2, 2), torch.tensor([8, 9]), torch.tensor([1, 0]))
    queue.refresh(torch.tensor([20, 21]))
    assert queue.clusters.tolist() == [-1, -1, -1, 21, 20, -1]
    with pytest.raises(ValueError, match=r"clusters_of_samples: expected .* up to index 1, .* got 1 ids"):
        queue.refresh(torch.tensor([20]))
    assert queue.clusters.tolist() == [-1, -1, -1, 21, 20, -1]


def test_samples_without_a_cluster_under_another_ignore_index() -> None:
    """A clustering says −1 for them, whatever the queue says."""
    queue = ClusterQueue(6, 2, ignore_index=-100)
    queue.enqueue(torch.randn(3, 2), torch.tensor([5, 6, 7]), torch.arange(3))
    queue.refresh(torch.tensor([-1, 4, -100]))
    assert queue.clusters.tolist() == [-100, 4, -100, -100, -100, -100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_exact(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    queue = ClusterQueue(10, 3, dtype=dtype)
    for size in (7, 6):
        queue.enqueue(*batch(size))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = ClusterQueue(10, 3, dtype=dtype)
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    following = batch(5)
    for one in (queue, other):
        one.enqueue(*following)
    for name, value in queue.state_dict().items():
        assert value.equal(other.state_dict()[name]), name


def test_ids_may_lie_on_another_device() -> None:
    """As a loader's sample numbers do: here on the CPU, of a queue without numbers."""
    queue = ClusterQueue(np.int64(4), np.int64(2), ignore_index=np.int64(-1)).to("meta")
    queue.enqueue(torch.ones(3, 2, device="meta"), torch.arange(3, device="meta"), torch.arange(3))
    assert queue.clusters.is_meta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16, "dim": 3}, r"queue.keys: expected shape \(16, 3\), got \(10, 3\)"),
        ({"size": 10, "dim": 3, "ignore_index": -100}, "queue.ignore_index: expected -100, got -1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(settings: dict[str, int], message: str) -> None:
    one, other = (nn.ModuleDict({"queue": ClusterQueue(**s)}) for s in ({"size": 10, "dim": 3}, settings))
    one["queue"].enqueue(*batch(5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(one.state_dict())
    for name, value in other.state_dict().items():
        assert value.equal(before[name]), name


def test_a_checkpoint_without_one_of_the_buffers_changes_nothing() -> None:
    queue, other = ClusterQueue(10, 3), ClusterQueue(10, 3)
    queue.enqueue(*batch(5))
    state = queue.state_dict()
    del state["written"]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="written: expected beside clusters, got none"):
            other.load_state_dict(state, strict=strict)
        assert not other.keys.any()
        assert bool((other.clusters == -1).all())
    other.load_state_dict({}, strict=False)  # of a model that had no queue


def test_a_checkpoint_without_an_ignore_index() -> None:
    queue, other = ClusterQueue(10, 3), ClusterQueue(10, 3)
    queue.enqueue(*batch(5))
    other.load_state_dict({name: value for name, value in queue.state_dict().items() if "extra" not in name})
    assert other.keys.equal(queue.keys)


def test_keys_leave_their_graph_and_their_memory() -> None:
    queue, keys = ClusterQueue(4, 2), torch.randn(4, 2, requires_grad=True)
    queue.enqueue(keys, torch.arange(4))
    assert not queue.keys.requires_grad
    stored = queue.keys.clone()
    with torch.no_grad():
        keys.zero_()
    assert queue.keys.equal(stored)
    assert copy.deepcopy(queue).keys.equal(stored)


def test_enqueue_compiles() -> None:
    queue = ClusterQueue(10, 3)
    twin = copy.deepcopy(queue)
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
    for size in (6, 6, 6):
        entries = batch(size)
        compiled(*entries)
        twin.enqueue(*entries)
    for name, value in queue.state_dict().items():
        assert value.equal(twin.state_dict()[name]), name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ClusterQueue(0, 4), ValueError, "size: expected at least 1, got 0"),
        (lambda: ClusterQueue(4, 2.0), TypeError, "dim: expected an int, got float"),
        (lambda: ClusterQueue(4, 2, dtype=torch.int64), TypeError, "dtype: expected a floating-point"),
        (lambda: ClusterQueue(4, 2**70), ValueError, "dim: expected an int of 64 bits"),
        (lambda: ClusterQueue(4, 2, ignore_index=2**70), ValueError, "ignore_index: expected an int of 64"),
        (lambda: ClusterQueue(4, 2, dtype=torch.float8_e4m3fn), TypeError, "dtype: expected float32, .* got"),
        (lambda: ClusterQueue(4, 2, gather="ring"), ValueError, "gather: expected 'none' or 'all'"),
    ],
)
def test_bad_settings_are_refused(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (([[1.0, 2.0]], torch.zeros(1)), TypeError, "keys: expected a tensor, got list"),
        ((torch.ones(1, 2, dtype=torch.int64), torch.zeros(1)), TypeError, "keys: expected a floating-point"),
        ((torch.ones(1, 3), torch.arange(1)), ValueError, r"keys: expected shape \[B, 2\], got \(1, 3\)"),
        ((torch.ones(1, 2), torch.zeros(1)), TypeError, "clusters: expected int64, got torch.float32"),
        ((torch.ones(1, 2), torch.arange(2)), ValueError, r"clusters: expected shape \(1,\), got \(2,\)"),
        ((torch.ones(1, 2), torch.arange(1), [0]), TypeError, "samples: expected a tensor, got list"),
        ((torch.ones(1, 2), torch.arange(1, device="meta")), ValueError, "clusters: expected numbers for a"),
    ],
)
def test_bad_entries_are_refused(entries, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    queue = ClusterQueue(4, 2)
    with pytest.raises(error, match=message):
        queue.enqueue(*entries)
    assert queue.filled == 0


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([0, 1], TypeError, "clusters_of_samples: expected a tensor, got list"),
        (torch.zeros(4), TypeError, "clusters_of_samples: expected int64"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, "clusters_of_samples: expected a vector"),
    ],
)
def test_bad_tables_are_refused(table, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        ClusterQueue(4, 2).refresh(table)


def test_repr() -> None:
    assert "size=4, dim=2, dtype=torch.float32, gather='none'" in repr(ClusterQueue(4, 2))


def test_what_a_backward_pass_reads_is_not_written_over_unnoticed() -> None:
    queue, loss_fn = ClusterQueue(16, 4), ClusteredInfoNCE()
    features, clusters = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    queue.enqueue(features, clusters)
    loss = loss_fn(features, clusters, queue.keys, queue.clusters)
    queue.enqueue(features, clusters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = loss_fn(features, clusters, queue.keys, queue.clusters)
    loss.backward()
    queue.enqueue(features, clusters)
    assert queue.filled == 16
