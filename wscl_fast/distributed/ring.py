"""Keys streamed round the ranks, so that none of them ever holds all keys.

Every rank keeps its queries. Its block of keys goes from rank to rank; at each of the W stops it meets the
queries there, while the next block is already on its way. After one trip every rank has, over all keys, what
was asked of its queries. The gradient takes a second trip: each block travels with the gradient gathered so
far and comes home with all of it.

On a rank, in memory: two blocks of keys, and as many of their gradients in the backward pass. On the wire:
M · d numbers a rank in the forward pass, as an all-gather sends, and twice that in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wscl_fast.distributed.collectives import (
    Group,
    agree,
    largest_over_ranks,
    peer,
    rank,
    rows_of_ranks,
    sum_over_ranks,
    world_size,
)
from wscl_fast.functional._passes import Passes
from wscl_fast.functional._requests import Request
from wscl_fast.functional._terms import term_of
from wscl_fast.functional._trips import Luggage, Trip, Visit, inputs_of
from wscl_fast.pairs import Pairs

__all__ = ["NO_SECOND", "Ring", "blocks_of_ranks", "round_trip", "wanted_by_any"]

NO_SECOND = "gather='ring': a ring has no second derivative; gather='all' with impl='chunked' has"


class Ring(Passes):
    """Answers over the keys of all ranks, of which each has its own; own keys are numbered among all.

    The pairs' scales carry no gradient: they are folded into the queries. Every rank must ask the same.
    """

    whole = False

    def __init__(self, fused: bool, group: Group, name: str) -> None:
        super().__init__(fused)
        self.group, self.name = group, name

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """The value of each request, all of them from one trip."""
        asked = list(requests.values())
        queries, keys = asked[0].pairs[:2]
        # Gradients travel in the queries' dtype.
        rows, wanted = rows_of_ranks(keys, self.group, self.name, [queries, *Luggage(asked).columns])
        keys = agree(keys) if wanted else keys.detach()
        inputs = inputs_of(asked)
        if any(request.inputs or term_of(request, self.fused).again for request in asked):
            # Their gradients may take a trip, on which every rank must go if one does.
            queries = agree(queries) if wanted_by_any(self.group, queries, *inputs) else queries
        route = _Route(rows, self.fused, self.group)
        scale = asked[0].pairs.scale.abs()
        *values, _, _ = Trip.apply(queries, keys, scale, route, asked, *inputs)  # type: ignore[no-untyped-call]
        return dict(zip(requests, values, strict=True))

    def folded(self, pairs: Pairs) -> Pairs:
        return pairs.folded()

    def largest(self, values: Tensor) -> Tensor:
        return largest_over_ranks(values, self.group)


class _Route(NamedTuple):
    """Round the ranks."""

    rows: list[int]  # keys of every rank
    fused: bool
    group: Group
    no_second: str = NO_SECOND

    def trip(
        self, queries: Tensor, keys: Tensor, requests: list[Request], visit: Visit, known: Tensor | None
    ) -> Tensor | None:
        luggage = Luggage(requests)

        def at_block(travelling: list[Tensor], first: int) -> Tensor | None:
            return visit(luggage.unpacked(queries, travelling, first))

        home = round_trip([keys, *luggage.columns], self.rows, self.group, at_block)
        return home if known is None or home is None else home.add_(known)


class _Traffic:
    """Sends to the next rank and receives from the one before, while this one computes."""

    def __init__(self, group: Group) -> None:
        me, size = rank(group), world_size(group)
        self.group, self.calls = group, 0
        self.after, self.before = (peer((me + step) % size, group) for step in (1, -1))
        self.operations: list[dist.P2POp] = []
        self.requests: list[dist.Work] = []

    def pass_on(self, tensor: Tensor, rows: int) -> Tensor:
        """Line a tensor up for the next rank; returns the room for what comes in its place, ``rows`` long."""
        room = tensor.new_empty(rows, *tensor.shape[1:])
        if tensor.numel():
            send = dist.P2POp(dist.isend, tensor.contiguous(), self.after, self.group, self.calls)
            self.operations.append(send)
        if room.numel():
            self.operations.append(dist.P2POp(dist.irecv, room, self.before, self.group, self.calls))
        self.calls += 1
        return room

    def start(self) -> None:
        self.requests = dist.batch_isend_irecv(self.operations) if self.operations else []

    def wait(self) -> None:
        for request in self.requests:
            request.wait()
        self.operations, self.requests = [], []  # what was sent may be freed


def blocks_of_ranks(block: Tensor, rows: list[int], group: Group = None) -> Iterator[tuple[int, Tensor]]:
    """Every rank's block of rows and its rank: the own one first, each next one under way meanwhile.

    No gradient comes back. Every rank has to go through all of them.

    Args:
        block: ``[rows[rank], ...]``, of one dtype on all ranks.
        rows: how many rows every rank has.
        group: the process group; by default all processes.
    """
    me, size = rank(group), world_size(group)
    traffic = _Traffic(group)
    for stop in range(size):
        coming = (me - stop - 1) % size
        room = block
        if stop < size - 1:
            room = traffic.pass_on(block, rows[coming])
            traffic.start()
        yield (me - stop) % size, block
        traffic.wait()
        block = room


def wanted_by_any(group: Group, *tensors: Tensor) -> bool:
    """Whether some rank wants a gradient of one of these."""
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return bool(sum_over_ranks(torch.tensor(float(wants), device=tensors[0].device), group) > 0)


def round_trip(
    travelling: list[Tensor],
    rows: list[int],
    group: Group,
    visit: Callable[[list[Tensor], int], Tensor | None],
    join: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
) -> Tensor | None:
    """Sends every rank's tensors once round; what is gathered for this rank's block comes home.

    Args:
        travelling: this rank's block, each tensor with a row for each of its keys.
        rows: how many keys every rank has.
        group: the process group.
        visit: what a block gets here, a row for each of its keys, or None; given the block's tensors and the
            number that its first key has among all.
        join: a visit's result, and what the block came with, as one; by default their sum.
    """
    me, size = rank(group), world_size(group)
    gathered: Tensor | None = None  # of the block that was here before
    for step in range(size):
        block = (me - step) % size
        traffic = _Traffic(group)
        following, came = None, None
        if step + 1 < size:
            following = [traffic.pass_on(tensor, rows[block - 1]) for tensor in travelling]
        if gathered is not None:
            came = traffic.pass_on(gathered, rows[block])
        traffic.start()
        mine = visit(travelling, sum(rows[:block]))
        traffic.wait()
        gathered = mine if mine is None or came is None else join(mine, came)
        if following is not None:
            travelling = following
    if gathered is None or size == 1:
        return gathered
    traffic = _Traffic(group)
    home = traffic.pass_on(gathered, rows[me])
    traffic.start()
    traffic.wait()
    return home
