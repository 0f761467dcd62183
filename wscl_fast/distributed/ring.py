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
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

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
from wscl_fast.distributed.terms import Needs, Term, term_of
from wscl_fast.functional._passes import Passes, Request

__all__ = ["Ring", "blocks_of_ranks"]


class Ring(Passes):
    """Answers over the keys of all ranks, of which each has its own; own keys are numbered among all.

    The pairs' scales carry no gradient: they are folded into the queries. Every rank must ask the same.
    """

    whole = False

    def __init__(self, fused: bool, group: Group) -> None:
        super().__init__(fused)
        self.group = group

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """The value of each request, all of them from one trip."""
        pairs = next(iter(requests.values())).pairs
        queries, keys = pairs.queries, pairs.keys
        rows, wanted = rows_of_ranks(keys, self.group)
        keys = agree(keys) if wanted else keys.detach()
        inputs = [getattr(request, name) for request in requests.values() for name in request.inputs]
        terms = [term_of(request) for request in requests.values()]
        if any(term.again for term in terms):
            # Their gradients take a trip, on which every rank must go if one does.
            wants = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, *inputs))
            flag = torch.tensor(float(wants), device=queries.device)
            queries = agree(queries) if sum_over_ranks(flag, self.group) > 0 else queries
        route = _Route(rows, self.fused, self.group)
        values = _Trip.apply(queries, keys, route, list(requests.values()), *inputs)  # type: ignore[no-untyped-call]
        return dict(zip(requests, values, strict=True))

    def largest(self, values: Tensor) -> Tensor:
        return largest_over_ranks(values, self.group)


class _Route(NamedTuple):
    """What does not change on the way."""

    rows: list[int]  # keys of every rank
    fused: bool
    group: Group


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


# What happens where a block meets this rank's queries: given the requests of this block alone, the gradient
# of its keys, or None.
_Visit = Callable[[list[Request]], "Tensor | None"]


def _round(
    queries: Tensor, keys: Tensor, requests: list[Request], route: _Route, visit: _Visit
) -> Tensor | None:
    """Sends every rank's keys once round; the gradient of this rank's block comes home with all in it."""
    me, size = rank(route.group), world_size(route.group)
    luggage = _Luggage(requests)
    travelling = [keys, *luggage.columns]
    gathered: Tensor | None = None  # the gradient of the block that was here before
    for step in range(size):
        block = (me - step) % size
        traffic = _Traffic(route.group)
        following, came = None, None
        if step + 1 < size:
            following = [traffic.pass_on(tensor, route.rows[block - 1]) for tensor in travelling]
        if gathered is not None:
            came = traffic.pass_on(gathered, route.rows[block])
        traffic.start()
        mine = visit(luggage.unpacked(queries, travelling, sum(route.rows[:block])))
        traffic.wait()
        gathered = mine if mine is None or came is None else mine.add_(came)
        if following is not None:
            travelling = following
    if gathered is None or size == 1:
        return gathered
    traffic = _Traffic(route.group)
    home = traffic.pass_on(gathered, route.rows[me])
    traffic.start()
    traffic.wait()
    return home


class _Luggage:
    """What travels beside the keys: ids and whatever else has a row for each key, each of them once."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.columns: list[Tensor] = []
        self.places = [
            [self._place(column) for column in (request.pairs.key_ids, *_more(request))]
            for request in requests
        ]

    def _place(self, column: Tensor) -> int:
        for place, known in enumerate(self.columns):
            if known is column:
                return place
        self.columns.append(column)
        return len(self.columns) - 1

    def unpacked(self, queries: Tensor, travelling: list[Tensor], first: int) -> list[Request]:
        """The requests of a block whose first key has this number; an own key outside of it is none."""
        keys, *columns = travelling
        keys = keys.to(queries.dtype)
        own = self.requests[0].pairs.own
        if own is not None:
            own = own - first
            own = torch.where((own >= 0) & (own < len(keys)), own, -1)
        made = []
        for request, (ids, *more) in zip(self.requests, self.places, strict=True):
            pairs = request.pairs._replace(queries=queries, keys=keys, key_ids=columns[ids], own=own)
            fields: dict[str, Any] = {"pairs": pairs}
            fields |= {name: columns[place] for name, place in zip(request.of_keys, more, strict=True)}
            made.append(replace(request, **fields))
        return made


def _more(request: Request) -> list[Tensor]:
    return [getattr(request, name) for name in request.of_keys]


class _Trip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, route: _Route, requests: list[Request], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        requests = _with_inputs(requests, [x.detach() for x in inputs])
        needs = Needs(*ctx.needs_input_grad[:2])
        terms = [term_of(request) for request in requests]

        def visit(of_block: list[Request]) -> None:
            for term, request in zip(terms, of_block, strict=True):
                term.add(request, needs, route.fused)

        _round(queries, keys, requests, route, visit)
        values = tuple(term.value() for term in terms)
        ctx.mark_non_differentiable(
            *(value for value, request in zip(values, requests, strict=True) if not request.differentiable)
        )
        ctx.save_for_backward(queries, keys, *inputs)
        # Of the requests the backward pass reads all but the tensors that were saved.
        ctx.needs, ctx.route, ctx.terms, ctx.requests = needs, route, terms, requests
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_queries, grad_keys, *of_inputs = _Return.apply(ctx, len(grads), *grads, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grad_queries, grad_keys, None, None, *of_inputs


class _Return(torch.autograd.Function):
    """The trip of the gradients. What it read has no gradient from here: that would take a third trip."""

    @staticmethod
    def forward(_: Any, ctx: Any, outputs: int, *tensors: Tensor) -> tuple[Any, ...]:
        grads, (queries, keys, *inputs) = tensors[:outputs], tensors[outputs:]
        terms: list[Term] = ctx.terms
        needs: Needs = ctx.needs
        requests = _with_inputs(ctx.requests, inputs)
        for term, request, grad in zip(terms, requests, grads, strict=True):
            term.turn(grad, request, queries)

        def visit(of_block: list[Request]) -> Tensor | None:
            grad: Tensor | None = None
            for term, request in zip(terms, of_block, strict=True):
                grad = term.back(request, needs, grad, ctx.route.fused)
            return grad

        home = None
        if needs.keys or any(term.again for term in terms):
            home = _round(queries, keys, requests, ctx.route, visit)
        grad_queries = sum((term.grad_queries for term in terms), torch.zeros_like(queries))
        grad_inputs = [grad for term in terms for grad in term.grad_inputs]
        grad_keys = None if home is None else home.to(keys.dtype)
        return grad_queries if needs.queries else None, grad_keys, *grad_inputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            "gather='ring': a ring has no second derivative; gather='all' with impl='chunked' has"
        )


def _with_inputs(requests: list[Request], inputs: list[Tensor]) -> list[Request]:
    """The requests with these tensors for the ones that get a gradient."""
    left = iter(inputs)
    made = []
    for request in requests:
        fields: dict[str, Any] = {name: next(left) for name in request.inputs}
        made.append(replace(request, **fields))
    return made
