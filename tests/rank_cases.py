"""What every process of a group runs; ``tests/test_distributed.py`` reports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from wscl_fast import ClusterQueue
from wscl_fast.distributed import broadcast, gather, rank, sum_over_ranks, world_size

CASES = {}


def case(function):  # type: ignore[no-untyped-def]
    CASES[function.__name__] = function
    return function


def close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-6) -> None:
    """Relative to the largest entry: what a gradient's error is measured by."""
    assert got is not None
    assert want is not None
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size + 1e-300)


def cut(whole: Tensor, rows: list[int], group: Any) -> Tensor:
    """The rows of this rank, a leaf of its own."""
    return whole.detach().split(rows)[rank(group)].clone().requires_grad_(whole.requires_grad)


def uneven(group: Any) -> list[int]:
    """Different numbers of rows for the ranks; the last has none."""
    return {2: [5, 0], 3: [3, 5, 0], 4: [3, 5, 1, 0]}[world_size(group)]


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
