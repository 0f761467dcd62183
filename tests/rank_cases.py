"""Collectives, queues and the plain loss over ranks; ``tests/test_distributed.py`` reports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import close, cut, uneven
from torch import Tensor

from wscl_fast import ClusterQueue, distributed, functional
from wscl_fast.distributed import broadcast, first_row, gather, rank, sum_over_ranks, world_size

CASES = {}


def case(function):  # type: ignore[no-untyped-def]
    CASES[function.__name__] = function
    return function


@case
def gather_is_exact(group: Any) -> None:
    for rows in (uneven(group), [4] * world_size(group)):
        whole = torch.randn(sum(rows), 2, 3, dtype=torch.float64, requires_grad=True)
        mine = cut(whole, rows, group)
        together = gather(mine, group)
        # Every rank asks something else of every row.
        weights = torch.randn(world_size(group), *whole.shape, dtype=torch.float64)
        (weights[rank(group)] * together.square()).sum().backward()
        (weights * whole.square()).sum().backward()
        assert together.equal(whole)
        close(mine.grad, whole.grad.split(rows)[rank(group)], 1e-14)


@case
def gather_of_every_dtype(group: Any) -> None:
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float32):
        whole = (torch.randn(sum(uneven(group)), 4) * 3).to(dtype)
        got = gather(cut(whole, uneven(group), group), group)
        assert got.dtype == dtype
        assert got.equal(whole)
        assert not got.requires_grad


@case
def gather_of_halves_under_autocast(group: Any) -> None:
    """Autocast to one half precision, rows of the other: a queue's keys, say."""
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        whole = torch.randn(sum(uneven(group)), 4).to(dtype).requires_grad_()
        mine = cut(whole, uneven(group), group)
        queue = ClusterQueue(16, 4, dtype=dtype, gather="all", group=group)
        with torch.autocast("cpu", other):
            got = gather(mine, group)
            queue.enqueue(mine, torch.arange(len(mine)))
        got.sum().backward()
        assert got.dtype == dtype
        assert got.equal(whole)
        assert (mine.grad == world_size(group)).all()
        assert queue.keys[: len(whole)].equal(whole)


@case
def gather_where_one_rank_has_no_gradient(group: Any) -> None:
    """A rank with detached rows still takes part in the backward pass, and nothing hangs."""
    mine = torch.ones(2, 3, dtype=torch.float64, requires_grad=rank(group) == 0)
    gather(mine, group).sum().backward()
    if rank(group) == 0:
        close(mine.grad, torch.full((2, 3), float(world_size(group)), dtype=torch.float64))


@case
def gather_refuses_rows_of_different_sizes(group: Any) -> None:
    with pytest.raises(ValueError, match=r"rows of one size on all ranks, got \[3, 4"):
        gather(torch.zeros(2, 3 + rank(group)), group)
    for shape, other in (((2, 3), (3, 2)), ((6,), (2, 3)), ((1, 6), (6,))):  # as many numbers
        own = shape if rank(group) else other
        for collective in (gather, first_row):
            with pytest.raises(ValueError, match="tensor: expected rows of one shape on all") as told:
                collective(torch.zeros(2, *own), group)
            assert str(own) in str(told.value)


@case
def rows_of_different_dtypes_are_refused(group: Any) -> None:
    """On every rank, by every way of gathering keys; an empty batch has to be of the others'."""
    me = rank(group)
    for dtypes in (
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.int32),
    ):
        with pytest.raises(ValueError, match=f"tensor: expected one dtype on all ranks, got .{dtypes[0]}, "):
            gather(torch.ones(1, 3).to(dtypes[min(me, 1)]), group)
    x, ids = torch.randn(0 if me else 5, 4).to(torch.float32 if me else torch.bfloat16), torch.arange(5)
    given = {"query_clusters": ids[: len(x)], "group": group}
    explicit = {"keys": x, "key_clusters": given["query_clusters"]}
    for gathering in ("all", "ring"):
        for options, name in (({}, "queries"), (explicit, "keys")):
            with pytest.raises(ValueError, match=f"{name}: expected one dtype on all ranks"):
                distributed.clustered_infonce(x, **given, **options, gather=gathering)


@case
def queries_of_different_dtypes(group: Any) -> None:
    """Sums are of one dtype where keys stay or come together; a ring, which carries gradients, refuses."""
    dtype = torch.float32 if rank(group) else torch.float64
    x, keys, ids = torch.randn(4, 3, dtype=dtype, requires_grad=True), torch.randn(6, 3), torch.arange(6) // 2
    given = {"keys": keys, "query_clusters": ids[:4], "key_clusters": ids, "group": group}
    losses = [distributed.clustered_infonce(x, **given, gather=gathering) for gathering in ("count", "all")]
    for loss in losses:
        loss.backward()
    assert [loss.dtype for loss in losses] == 2 * [dtype]
    with pytest.raises(ValueError, match="keys: expected as much known of a row on all ranks"):
        distributed.clustered_infonce(x, **given, gather="ring")


@case
def what_a_ring_carries_is_alike(group: Any) -> None:
    """Words of tags, levels, an auxiliary's dtype: refused on every rank, as where all keys come together."""
    me, x = min(rank(group), 1), torch.randn(4, 3)
    levels = {"query_clusters": torch.zeros(4, 1 + me, dtype=torch.int64)}
    words = {"query_auxiliary": torch.ones(4, 1 + me, dtype=torch.int64), "affinity": "jaccard"}
    vectors = {
        "query_auxiliary": torch.ones(4, 2).to((torch.float32, torch.float64)[me]),
        "affinity": "kernel",
    }
    soft, nested = distributed.soft_infonce, distributed.hierarchical_infonce
    for loss, known, name in (
        (nested, levels, "query_clusters"),
        (soft, words, "query_auxiliary"),
        (soft, vectors, "query_auxiliary"),
    ):
        with pytest.raises(ValueError, match="keys: expected as much known of a row on all ranks"):
            loss(x, **known, gather="ring", group=group)
        with pytest.raises(ValueError, match=f"{name}: expected (rows of one size|one dtype) on all ranks"):
            loss(x, **known, gather="all", group=group)
    with pytest.raises(ValueError, match="key_clusters: expected rows of one size on all ranks"):
        nested(x, **levels, gather="count", group=group)


@case
def sums_and_broadcasts(group: Any) -> None:
    mine = torch.arange(6.0).view(2, 3).T + rank(group)
    total = sum_over_ranks(mine, group)
    sent = [broadcast(mine, source, group) for source in range(world_size(group))]
    n = world_size(group)
    assert mine.equal(torch.arange(6.0).view(2, 3).T + rank(group))
    assert total.equal(n * torch.arange(6.0).view(2, 3).T + n * (n - 1) / 2)
    for source, tensor in enumerate(sent):
        assert tensor.equal(torch.arange(6.0).view(2, 3).T + source)


@case
def queues_stay_the_same(group: Any) -> None:
    queue, one = ClusterQueue(16, 4, gather="all", group=group), ClusterQueue(16, 4)
    for _ in range(4):
        rows = uneven(group)
        entries = torch.randn(sum(rows), 4), torch.randint(5, (sum(rows),)), torch.randint(99, (sum(rows),))
        one.enqueue(*entries)
        queue.enqueue(*(cut(entry, rows, group) for entry in entries))
    for name, value in queue.state_dict().items():
        assert value.equal(one.state_dict()[name]), name


@case
def own_queues_by_default(group: Any) -> None:
    queue = ClusterQueue(4, 2)
    queue.enqueue(torch.full((3, 2), float(rank(group))), torch.arange(3))
    dist.barrier(group)
    assert queue.filled == 3
    assert (queue.keys[:3] == rank(group)).all()


class Split:
    """A problem of one process, and the part of it that a rank has."""

    def __init__(self, group: Any, dtype: torch.dtype, *, explicit: bool, own: bool = False) -> None:
        self.group, self.dtype = group, dtype
        size = world_size(group)
        self.rows = {"queries": [[9, 0], [7, 12, 0], [8, 13, 0, 5]][size - 2]}
        n, d = sum(self.rows["queries"]), 6
        self.whole = {"queries": torch.randn(n, d, dtype=dtype, requires_grad=True)}
        self.whole["query_clusters"] = torch.randint(-1, 3, (n,))
        self.whole["weights"] = torch.rand(n, dtype=dtype)
        if explicit:
            self.rows["keys"] = [17, 0, 14, 9][:size]
            m = sum(self.rows["keys"])
            self.whole["keys"] = torch.randn(m, d, dtype=dtype, requires_grad=True)
            self.whole["key_clusters"] = torch.randint(-1, 3, (m,))
            if own:
                self.whole["exclude_self"] = torch.randint(-1, m, (n,))
        self.mine = {name: self.part(name, value) for name, value in self.whole.items()}
        for side in (self.whole, self.mine):
            side["temperature"] = torch.tensor(0.3, dtype=dtype, requires_grad=True)

    def part(self, name: str, value: Tensor) -> Tensor:
        rows = self.rows["keys" if name.startswith("key") else "queries"]
        return cut(value, rows, self.group)

    def one(self, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
        """Loss and gradients of one process, this rank's part of them; by the definition."""
        leaves = {
            name: value.detach().to(dtype).requires_grad_()
            for name, value in self.whole.items()
            if value.requires_grad
        }
        loss = functional.clustered_infonce(**{**self.whole, **leaves, **options}, impl="reference")
        if loss.ndim == 0:
            loss.backward()
        else:  # every rank asks something else of its rows
            upstream = torch.arange(1.0, world_size(self.group) + 1)
            (loss * upstream.repeat_interleave(torch.tensor(self.rows["queries"]))).sum().backward()
            loss = self.part("queries", loss)
        return [loss.detach()] + [
            leaf.grad if leaf.ndim == 0 else self.part(name, leaf.grad) for name, leaf in leaves.items()
        ]

    def ours(self, **options: Any) -> list[Tensor]:
        loss = distributed.clustered_infonce(**self.mine, group=self.group, **options)
        (loss.sum() * (1 + rank(self.group) if loss.ndim else 1)).backward()
        gradients = [self.mine[name].grad for name, value in self.whole.items() if value.requires_grad]
        # The temperature is on all ranks: its gradient is the sum of their shares.
        return [loss.detach(), *gradients[:-1], sum_over_ranks(gradients[-1], self.group)]


@case
def loss_of_one_process(group: Any) -> None:
    """Both ways of gathering, both kinds of keys and positives, every reduction; one rank has no rows."""
    for gathering in ("all", "ring"):
        for explicit, own in ((False, False), (True, False), (True, True)):
            for positives in ("out", "in"):
                for reduction, impl in (("mean", "auto"), ("sum", "auto"), ("none", "chunked")):
                    split = Split(group, torch.float64, explicit=explicit, own=own)
                    options = {"positives": positives, "reduction": reduction}
                    got = split.ours(gather=gathering, impl=impl, **options)
                    for here, there in zip(got, split.one(**options), strict=True):
                        close(here, there)


@case
def loss_in_float32(group: Any) -> None:
    """No further from float64 than plain PyTorch in one process is, but for a little."""
    for gathering, impl in (("all", "auto"), ("ring", "auto"), ("ring", "chunked")):
        for explicit in (False, True):
            split = Split(group, torch.float32, explicit=explicit)
            results = split.ours(gather=gathering, impl=impl), split.one(torch.float32), split.one()
            for got, plain, exact in zip(*results, strict=True):
                error, plain_error = (float((x - exact).abs().sum()) for x in (got, plain))
                assert got.dtype == torch.float32
                assert error <= plain_error + 1e-6 * float(exact.abs().sum())


@case
def loss_of_half_precision(group: Any) -> None:
    """Keys travel in their own dtype, and their gradient comes home in it."""
    for gathering in ("all", "ring"):
        split = Split(group, torch.bfloat16, explicit=True)
        for here, there in zip(split.ours(gather=gathering), split.one(), strict=True):
            close(here.double(), there.double(), 0.02)
        assert split.mine["keys"].grad.dtype == torch.bfloat16


@case
def the_own_key_may_meet_its_query(group: Any) -> None:
    for gathering in ("all", "ring"):
        split = Split(group, torch.float64, explicit=False)
        got = split.ours(gather=gathering, exclude_self=False)
        for here, there in zip(got, split.one(exclude_self=False), strict=True):
            close(here, there)


@case
def keys_without_gradient(group: Any) -> None:
    """A momentum encoder's keys: only queries learn, and only they do."""
    for gathering in ("all", "ring"):
        split = Split(group, torch.float64, explicit=True)
        want = split.one()
        split.mine["keys"] = split.mine["keys"].detach()
        loss = distributed.clustered_infonce(**split.mine, gather=gathering, group=group)
        loss.backward()
        close(loss.detach(), want[0])
        close(split.mine["queries"].grad, want[1])


@case
def a_rank_without_a_graph_of_its_own(group: Any) -> None:
    """The rank with the empty batch has tensors without gradient, and the others do not wait for it."""
    for gathering in ("all", "ring"):
        split = Split(group, torch.float64, explicit=False)
        want = split.one()
        if not len(split.mine["queries"]):
            split.mine["queries"] = split.mine["queries"].detach()
        split.mine["temperature"] = 0.3
        loss = distributed.clustered_infonce(**split.mine, gather=gathering, group=group)
        loss.backward()
        close(loss.detach(), want[0])
        if len(split.mine["queries"]):
            close(split.mine["queries"].grad, want[1])


@case
def a_queue_that_every_rank_holds(group: Any) -> None:
    """The keys stay on their ranks; the average is over all anchors."""
    split = Split(group, torch.float64, explicit=True)
    want = split.one()
    split.mine |= {name: split.whole[name].detach() for name in ("keys", "key_clusters")}
    loss = distributed.clustered_infonce(**split.mine, gather="count", group=group)
    loss.backward()
    close(loss.detach(), want[0])
    close(split.mine["queries"].grad, want[1])


@case
def many_tiles(group: Any) -> None:
    """More rows and columns than plain PyTorch's tile has, and a log-sum-exp far from what float32 holds."""
    x, keys = torch.randn(1100, 3), 40 * torch.randn(4200, 3)
    ids, key_ids = torch.randint(0, 50, (1100,)), torch.randint(0, 50, (4200,))
    want = functional.clustered_infonce(
        x.double(), keys.double().repeat(world_size(group), 1), query_clusters=ids,
        key_clusters=key_ids.repeat(world_size(group)),
    )  # fmt: skip
    for impl in ("auto", "chunked"):
        got = distributed.clustered_infonce(
            x, keys, query_clusters=ids, key_clusters=key_ids, gather="ring", group=group, impl=impl
        )
        close(got.double(), want)


@case
def nothing_to_learn_from(group: Any) -> None:
    for gathering in ("all", "ring", "count"):
        x = torch.randn(3, 2, requires_grad=True)
        ids = torch.arange(3) + 10 * rank(group)
        loss = distributed.clustered_infonce(x, query_clusters=ids, gather=gathering, group=group)
        loss.backward()
        assert loss == 0
        assert (x.grad == 0).all()
