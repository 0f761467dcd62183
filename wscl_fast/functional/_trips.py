"""Requests over blocks of keys as one function: a trip over the blocks, and another one for the gradients.

On the first trip every block meets the queries, and what is asked of it joins what was found before; on the
second every block meets them again and gets its gradient, all requests' together. Of the size of all keys
nothing is kept but the keys themselves and one gradient. A route says where the blocks come from: out of one
tensor (:class:`Slices`), or from other processes (:mod:`wscl_fast.distributed.ring`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from wscl_fast.functional._requests import Request
from wscl_fast.functional._terms import Needs, Term, term_of
from wscl_fast.matching import dot
from wscl_fast.values import Unchanged

__all__ = ["Luggage", "Route", "Slices", "Trip", "Visit", "inputs_of"]

BLOCK = 1 << 20  # numbers of a block of keys: 4 MiB in float32
LEAST_ROWS = 1024  # but so many keys, for the products to be worth it

# What happens where a block meets the queries: given the requests of this block alone, the gradient of its
# keys, or None.
Visit = Callable[[list[Request]], "Tensor | None"]


class Route(Protocol):
    """Where blocks of keys come from."""

    @property
    def fused(self) -> bool:
        """Whether kernels answer."""

    @property
    def no_second(self) -> str:
        """What is said to who asks for a second derivative."""

    def trip(
        self, queries: Tensor, keys: Tensor, requests: list[Request], visit: Visit, known: Tensor | None
    ) -> Tensor | None:
        """Have every block visited; the gradient of ``keys``, if visits give one, added to what is known."""


class Slices(NamedTuple):
    """Blocks of one tensor, each brought to the queries' dtype as its turn comes."""

    fused: bool
    no_second: str = "the fused kernels have no second derivative; impl='chunked' and impl='reference' have"

    def trip(
        self, queries: Tensor, keys: Tensor, requests: list[Request], visit: Visit, known: Tensor | None
    ) -> Tensor | None:
        """Slice by slice. What is known of the gradient is added to in place."""
        luggage = Luggage(requests)
        rows = [keys, *luggage.columns]
        step = max(BLOCK // max(keys.shape[1], 1), LEAST_ROWS)
        grad = known
        for start in range(0, max(len(keys), 1), step):
            block = slice(start, start + step)
            mine = visit(luggage.unpacked(queries, [x[block] for x in rows], start))
            if mine is None:
                continue
            if grad is None:
                grad = torch.empty_like(keys)
            if known is None:
                grad[block] = mine
            else:
                grad[block] += mine
        return grad


class Luggage:
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


class Trip(torch.autograd.Function):
    """The requests' values, and after them queries and keys again (once, where they are one tensor), for a
    later trip over the same ones.

    The gradients that the later trip finds arrive in one piece here and are added to in place: two trips need
    no two gradients of all rows. The scale's is read off the queries': with L a function of s q,
    ``s ∂L/∂s = Σ_i ⟨q_i, ∂L/∂q_i⟩``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        route: Route,
        requests: list[Request],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        requests = _with_inputs([_detached(x) for x in requests], [x.detach() for x in inputs])
        of_queries, of_keys, of_scale = ctx.needs_input_grad[:3]
        needs = Needs(of_queries or of_scale, of_keys)
        terms = [term_of(request, route.fused) for request in requests]

        def visit(of_block: list[Request]) -> None:
            for term, request in zip(terms, of_block, strict=True):
                term.add(request, needs, route.fused)

        route.trip(queries, keys, requests, visit, None)
        values = tuple(term.value() for term in terms)
        ctx.set_materialize_grads(False)
        without = [
            value for value, request in zip(values, requests, strict=True) if not request.differentiable
        ]
        # Within a batch there is one gradient of both roles, where it is not sent away to be added up.
        ctx.one = keys is queries and needs.queries and needs.keys and isinstance(route, Slices)
        again = [keys.detach()] if ctx.one else [queries.detach(), keys.detach()]
        unwanted = [x for x, wanted in zip(again, (of_queries, of_keys), strict=False) if not wanted]
        ctx.mark_non_differentiable(*without, *unwanted)
        ctx.save_for_backward(queries, keys, scale, *inputs)
        # Of the requests the backward pass reads all but the tensors that were saved.
        ctx.unchanged = Unchanged(*(x for request in requests for x in _unsaved(request)))
        ctx.needs, ctx.route, ctx.terms, ctx.requests = needs, route, terms, requests
        ctx.shapes = [value.shape for value in values]
        return *values, *again

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.unchanged.check()
        *of_values, known = grads
        known_of_queries = known if ctx.one else of_values.pop()
        saved = ctx.saved_tensors
        of_values = [
            saved[0].new_zeros(shape) if grad is None else grad
            for grad, shape in zip(of_values, ctx.shapes, strict=True)
        ]
        grad_queries, grad_keys, grad_scale, *of_inputs = _Return.apply(  # type: ignore[no-untyped-call]
            ctx, known_of_queries, known, len(of_values), *of_values, *saved
        )
        if not ctx.needs_input_grad[0]:
            grad_queries = None
        return grad_queries, grad_keys, grad_scale, None, None, *of_inputs


class _Return(torch.autograd.Function):
    """The trip of the gradients. What it read has no gradient from here: that would take a third trip."""

    @staticmethod
    def forward(
        own: Any,
        ctx: Any,
        known_of_queries: Tensor | None,
        known: Tensor | None,
        outputs: int,
        *tensors: Tensor,
    ) -> tuple[Any, ...]:
        own.no_second = ctx.route.no_second
        grads, (queries, keys, scale, *inputs) = tensors[:outputs], tensors[outputs:]
        terms: list[Term] = ctx.terms
        needs: Needs = ctx.needs
        requests = _with_inputs(ctx.requests, inputs)
        known_of_scale: Tensor | float = 0.0
        if known_of_queries is None:
            grad_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        else:
            grad_queries = known_of_queries
            if ctx.needs_input_grad[2]:
                known_of_scale = dot(queries, grad_queries)
        for term, request, grad in zip(terms, requests, grads, strict=True):
            term.turn(grad, request, queries, grad_queries)

        def visit(of_block: list[Request]) -> Tensor | None:
            grad: Tensor | None = None
            for term, request in zip(terms, of_block, strict=True):
                grad = term.back(request, needs, grad, ctx.route.fused)
            return grad

        grad_keys = grad_queries if ctx.one else known
        if needs.keys or any(term.again for term in terms):
            with torch.autocast(queries.device.type, enabled=False):
                grad_keys = ctx.route.trip(queries, keys, requests, visit, grad_keys)
        for term in terms:
            term.add_queries(grad_queries)
        grad_scale = None
        if ctx.needs_input_grad[2]:  # of which keys have as much as queries
            grad_scale = (dot(queries, grad_queries) - known_of_scale).to(scale.dtype)
            grad_scale = grad_scale / (2 * scale if ctx.one else scale)
        grad_inputs = [grad for term in terms for grad in term.grad_inputs]
        return (
            grad_queries if needs.queries else None,  # of a scale's gradient too
            None if grad_keys is None or ctx.one else grad_keys.to(keys.dtype),
            grad_scale,
            *grad_inputs,
        )

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(ctx.no_second)


def inputs_of(requests: list[Request]) -> list[Tensor]:
    """The tensors beside queries and keys that get a gradient, in the order in which a trip takes them."""
    return [getattr(request, name) for request in requests for name in request.inputs]


def _unsaved(request: Request) -> list[Tensor | None]:
    """What a trip reads of it beside queries, keys and what gets a gradient."""
    pairs, more = request.pairs, {*request.of_queries, *request.of_keys} - {*request.inputs}
    return [pairs.query_ids, pairs.key_ids, pairs.own, *(getattr(request, name) for name in sorted(more))]


def _detached(request: Request) -> Request:
    """The request with a scale that has no history."""
    return replace(request, pairs=request.pairs._replace(scale=request.pairs.scale.detach()))


def _with_inputs(requests: list[Request], inputs: list[Tensor]) -> list[Request]:
    """The requests with these tensors for the ones that get a gradient."""
    left = iter(inputs)
    made = []
    for request in requests:
        fields: dict[str, Any] = {name: next(left) for name in request.inputs}
        made.append(replace(request, **fields))
    return made
