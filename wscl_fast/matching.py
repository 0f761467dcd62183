"""Counts and sums over the keys of each query's id, without a pass over pairs.

    count_i = |P(i)|,   sum_i = Σ_{j ∈ P(i)} v_j,   and the other way round  Σ_{i: j ∈ P(i)} u_i

One sum for each id, less what a query's own key adds: O((N + M) width). In double precision, a few keys at a
time, so that keys in single precision are never copied whole. An own key that is infinite or NaN cannot be
taken off again: it stays out of the sums, and all but those whose own it is get NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wscl_fast.pairs import Pairs
from wscl_fast.scatter import add_rows
from wscl_fast.slices import slices
from wscl_fast.values import may_look

__all__ = [
    "Matching",
    "add_gradients",
    "allowed_count",
    "allowed_sum",
    "chunks",
    "dot",
    "matching_count",
    "matching_logits",
    "matching_sum",
    "own_not_finite",
    "products",
    "squared_lengths",
]

CHUNK = 1 << 18  # numbers in double precision at a time: 2 MiB, in a core's cache
COLUMNS = 1 << 19  # numbers of sums in double precision at a time, where there is one for each query: 4 MiB
LEAST_COLUMNS = 16  # but so many columns: a row of them is a line of cache


def matching_count(pairs: Pairs) -> Tensor:
    """How many keys of its own id each query may meet, ``[N]`` int64."""
    ids = pairs.query_ids
    ordered = pairs.key_ids.sort().values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    if pairs.own is not None and len(ordered):
        count = count - _own(pairs, pairs.own, same=True).there.to(count.dtype)
    return count.masked_fill(ids == pairs.ignore_index, 0)


def allowed_count(pairs: Pairs) -> Tensor:
    """How many keys each query may meet, ``[N]`` int64."""
    count = (pairs.key_ids != pairs.ignore_index).sum().expand(len(pairs.queries))
    if pairs.own is not None and len(pairs.key_ids):
        count = count - _own(pairs, pairs.own, same=False).there.to(count.dtype)
    return count.masked_fill(pairs.query_ids == pairs.ignore_index, 0)


def matching_sum(pairs: Pairs, values: Tensor) -> Tensor:
    """``Σ values_j`` over the keys of query i's id that it may meet, ``[N, width]`` in double precision."""
    # Within a batch both sides have the same ids; a function that is being traced takes no tensor twice.
    key_ids = pairs.key_ids.view_as(pairs.key_ids)
    known = (pairs.query_ids, key_ids, pairs.own, pairs.ignore_index, _wide(values), False)
    return _Sum.apply(values, *known)  # type: ignore[no-untyped-call,no-any-return]


def matching_logits(pairs: Pairs) -> Tensor:
    """``Σ S_ij`` over the keys of query i's id that it may meet, ``[N]``."""
    # Within a batch both sides are one tensor, with the same ids: see above.
    keys, key_ids = pairs.keys.view_as(pairs.keys), pairs.key_ids.view_as(pairs.key_ids)
    known = (pairs.query_ids, key_ids, pairs.own, pairs.ignore_index)
    found: Tensor = _Products.apply(pairs.queries, keys, *known)  # type: ignore[no-untyped-call]
    return pairs.scale * found


@torch.no_grad()
def squared_lengths(values: Tensor) -> Tensor:
    """``‖values_j‖²`` ``[M]`` in double precision."""
    lengths = values.new_empty(len(values), dtype=_wide(values))
    for chunk in chunks(values):
        lengths[chunk] = values[chunk].to(lengths.dtype).square().sum(1)
    return lengths


def allowed_sum(pairs: Pairs, values: Tensor) -> Tensor:
    """``Σ values_j`` over all keys that query i may meet, ``[N, width]`` in double precision; no gradient."""
    counted = pairs.key_ids != pairs.ignore_index
    own: _SplitOwn | None = None
    if pairs.own is not None and len(values):
        own = _own(pairs, pairs.own, same=False).split(values)
        counted = counted & ~own.left_out
    total = torch.zeros(values.shape[1], dtype=_wide(values), device=values.device)
    for chunk in chunks(values):
        total += torch.where(counted[chunk, None], values[chunk], 0.0).to(total.dtype).sum(0)
    result = total.expand(len(pairs.query_ids), -1)
    if own is not None:
        result = torch.where(own.touched()[:, None], torch.nan, result - own.finite.of(values))
    return torch.where((pairs.query_ids != pairs.ignore_index)[:, None], result, 0.0)


def own_not_finite(pairs: Pairs, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys are some query's own and have values that are not all finite, ``[M]`` bool, and which
    queries may meet one of these, ``[N]`` bool.
    """
    assert pairs.own is not None
    own = _own(pairs, pairs.own, same=False).split(values)
    return own.left_out, own.touched()


class Matching:
    """The sums for some queries, over the blocks of keys that were added so far."""

    def __init__(self, query_ids: Tensor, ignore_index: int) -> None:
        self.query_ids, self.ignore_index = query_ids, ignore_index
        # How many ids there are is not known without looking.
        self.ordered = torch.unique(query_ids) if may_look(query_ids) else query_ids.sort().values
        # The sum of an id lies where the id first stands in order; the last slot is of those without a query.
        self.none = len(self.ordered)
        self.of_query = self._slots(query_ids)
        self.sums: Tensor | None = None
        self.own_sum: Tensor | None = None
        self.touched: Tensor | None = None  # [N]: by how many keys that stayed out

    def placed(self, pairs: Pairs) -> Placed:
        """Where a block of keys stands among the ids."""
        own = None
        if pairs.own is not None and len(pairs.key_ids):
            own = _own(pairs, pairs.own, same=True)
        return Placed(self._slots(pairs.key_ids), own)

    def add(self, block: Placed, values: Tensor) -> None:
        """Add a block of keys, with a row of ``values`` for each of them."""
        wide = _wide(values)
        if self.sums is None:
            self.sums = torch.zeros(self.none + 1, values.shape[1], dtype=wide, device=values.device)
        slots = block.slots
        if block.own is not None:
            own = block.own.split(values)
            of_id = slots.new_zeros(self.none + 1).index_add_(0, slots, own.left_out.to(slots.dtype))
            touched = of_id[self.of_query] - own.apart.to(slots.dtype)
            self.touched = touched if self.touched is None else self.touched + touched
            if self.own_sum is None:  # a query has one own key, so that this is no less exact than its sum
                self.own_sum = values.new_zeros(len(self.query_ids), values.shape[1])
            for rows in chunks(self.own_sum):
                self.own_sum[rows] += own.finite.of(values, rows)
            slots = slots.masked_fill(own.left_out, self.none)
        for chunk in chunks(values):
            add_rows(self.sums, slots[chunk], values[chunk].to(wide))

    def sum(self, rows: slice = slice(None)) -> Tensor:
        """``[N, width]`` in double precision, of some queries or all: the sum of the keys so far."""
        assert self.sums is not None
        sums = self.sums.index_select(0, self.of_query[rows])
        if self.own_sum is not None and self.touched is not None:
            sums -= self.own_sum[rows]
            sums.masked_fill_((self.touched[rows] > 0)[:, None], torch.nan)
        return sums.masked_fill_((self.query_ids[rows] == self.ignore_index)[:, None], 0)

    def take(self, block: Placed, values: Tensor) -> None:
        """Add a block of keys to nothing, whatever was added before."""
        self.sums = self.own_sum = self.touched = None
        self.add(block, values)

    def per_id(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """``[ids + 1, width]``: for every id the sum of its queries' rows of ``values [N, width]``, by their
        ``weights [N]``.
        """
        wide = _wide(values)
        sums = torch.zeros(self.none + 1, values.shape[1], dtype=wide, device=values.device)
        for chunk in chunks(values):
            rows = values[chunk] if weights is None else weights[chunk, None] * values[chunk]
            add_rows(sums, self.of_query[chunk], rows.to(wide))
        sums[-1].zero_()
        return sums

    def spread(
        self, grad: Tensor, block: Placed, values: Tensor, per_id: Tensor, weights: Tensor | None = None
    ) -> None:
        """Add to every key's row of ``grad [M, width]`` the ``values`` of the queries that have its id, which
        :meth:`per_id` summed up with the same weights.
        """
        for chunk in chunks(grad):
            grad[chunk] += per_id.index_select(0, block.slots[chunk])
        if block.own is not None:
            there, place = block.own.there[:, None], block.own.place
            for rows in chunks(values):
                mine = values[rows] if weights is None else weights[rows, None] * values[rows]
                add_rows(grad, place[rows], -torch.where(there[rows], mine, 0.0).to(grad.dtype))

    def _slots(self, ids: Tensor) -> Tensor:
        if self.none == 0:
            return torch.zeros_like(ids)
        slots = torch.searchsorted(self.ordered, ids).clamp_(max=self.none - 1)
        known = (self.ordered[slots] == ids) & (ids != self.ignore_index)
        return torch.where(known, slots, self.none)


class Placed(NamedTuple):
    """A block of keys among the ids of the queries."""

    slots: Tensor  # [M] int64: where the sum of each key's id lies
    own: _Own | None


class _Own(NamedTuple):
    """The own key of each query."""

    place: Tensor  # [N] int64, within the keys
    there: Tensor  # [N] bool: whether it is one of them, and would be met

    def of(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Their rows ``[N, width]``, of some queries or all, zero where there is none."""
        return torch.where(self.there[rows, None], values.index_select(0, self.place[rows]), 0.0)

    def split(self, values: Tensor) -> _SplitOwn:
        """By whether their values are all finite."""
        finite = torch.empty_like(self.there)
        for rows in _chunks(len(finite), values.shape[1]):
            finite[rows] = values.index_select(0, self.place[rows]).isfinite().all(1)
        apart = self.there & ~finite
        times = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        times.index_add_(0, self.place, apart.long())
        return _SplitOwn(self._replace(there=self.there & finite), apart, times > 0)


class _SplitOwn(NamedTuple):
    """Own keys whose values are finite, and the others."""

    finite: _Own
    apart: Tensor  # [N] bool: whose own key would be met, but is not finite
    left_out: Tensor  # [M] bool: these keys

    def touched(self) -> Tensor:
        """``[N]`` bool: who may meet one of the keys that are left out, where all with an id may be met."""
        return self.left_out.sum() > self.apart.long()


def _own(pairs: Pairs, own: Tensor, *, same: bool) -> _Own:
    """Own keys that have an id, with ``same`` those of their query's id; there are keys."""
    place = own.clamp(min=0, max=len(pairs.key_ids) - 1)
    ids = pairs.key_ids[place]
    there = (own == place) & (ids != pairs.ignore_index)
    return _Own(place, there & (ids == pairs.query_ids) if same else there)


class _Sum(torch.autograd.Function):
    """The keys' values summed for the queries, or (``back``) the queries' for the keys.

    Either is linear, and the other's gradient: there are derivatives of every order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        query_ids: Tensor,
        key_ids: Tensor,
        own: Tensor | None,
        ignore_index: int,
        dtype: torch.dtype,
        back: bool,
    ) -> Tensor:
        ctx.save_for_backward(query_ids, key_ids, own)
        ctx.ignore_index, ctx.dtype, ctx.back = ignore_index, values.dtype, back
        pairs = Pairs(values, values, query_ids, key_ids, own, values.new_ones(()), ignore_index)
        matching = Matching(query_ids, ignore_index)
        if not back:
            matching.add(matching.placed(pairs), values)
            return matching.sum().to(dtype)
        sums = values.new_zeros(len(key_ids), values.shape[1], dtype=dtype)
        matching.spread(sums, matching.placed(pairs), values, matching.per_id(values))
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        known = (*ctx.saved_tensors, ctx.ignore_index, ctx.dtype, not ctx.back)
        return _Sum.apply(grad, *known), *(None,) * 6  # type: ignore[no-untyped-call]


class _Products(torch.autograd.Function):
    """``⟨q_i, Σ k_j⟩`` over the keys of query i's id that it may meet, ``[N]``.

    The sums have the size of the queries. They are made a few columns at a time, and made again for the
    backward pass instead of kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        query_ids: Tensor,
        key_ids: Tensor,
        own: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, query_ids, key_ids, own)
        ctx.ignore_index = ignore_index
        pairs = Pairs(queries, keys, query_ids, key_ids, own, queries.new_ones(()), ignore_index)
        return products(pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        queries, keys, query_ids, key_ids, own = ctx.saved_tensors
        grad, of_queries, of_keys = grad[:, None], None, None
        if torch.is_grad_enabled():  # a gradient of this one may be asked for
            known = (query_ids, key_ids, own, ctx.ignore_index)
            if ctx.needs_input_grad[0]:
                sums: Tensor = _Sum.apply(keys, *known, _wide(keys), False)  # type: ignore[no-untyped-call]
                of_queries = grad * sums.to(queries.dtype)
            if ctx.needs_input_grad[1]:
                of_keys = _Sum.apply(grad * queries, *known, keys.dtype, True)  # type: ignore[no-untyped-call]
            return of_queries, of_keys, *(None,) * 4
        pairs = Pairs(queries, keys, query_ids, key_ids, own, queries.new_ones(()), ctx.ignore_index)
        of_queries, of_keys = (
            torch.zeros_like(rows, memory_format=torch.contiguous_format) if needed else None
            for rows, needed in zip((queries, keys), ctx.needs_input_grad, strict=False)
        )
        add_gradients(pairs, grad[:, 0], of_queries, of_keys)
        return of_queries, of_keys, *(None,) * 4


@torch.no_grad()
def products(pairs: Pairs) -> Tensor:
    """``⟨q_i, Σ k_j⟩`` over the keys of query i's id that it may meet, ``[N]``, without a gradient."""
    queries, keys = pairs.queries, pairs.keys
    total = torch.zeros(len(queries), dtype=_wide(queries), device=queries.device)
    matching = Matching(pairs.query_ids, pairs.ignore_index)
    block = matching.placed(pairs)
    for columns in _columns(queries):
        part = queries[:, columns]
        matching.take(block, keys[:, columns])
        for rows in chunks(part):
            total[rows] += (part[rows] * matching.sum(rows)).sum(1)
    return total.to(queries.dtype)


@torch.no_grad()
def add_gradients(pairs: Pairs, upstream: Tensor, of_queries: Tensor | None, of_keys: Tensor | None) -> None:
    """Add the gradients of :func:`products` for ``upstream [N]`` to what there is of the queries and keys."""
    matching = Matching(pairs.query_ids, pairs.ignore_index)
    block = matching.placed(pairs)
    for columns in _columns(pairs.queries):
        part = pairs.queries[:, columns]
        if of_queries is not None:
            matching.take(block, pairs.keys[:, columns])
            for rows in chunks(part):
                of_queries[rows, columns] += upstream[rows, None] * matching.sum(rows).to(of_queries.dtype)
        if of_keys is not None:
            per_id = matching.per_id(part, upstream)
            matching.spread(of_keys[:, columns], block, part, per_id, upstream)


def dot(rows: Tensor, grads: Tensor) -> Tensor:
    """``Σ_i ⟨rows_i, grads_i⟩`` in double precision; whatever stands in rows without a gradient."""
    total = torch.zeros((), dtype=_wide(rows), device=rows.device)
    for chunk in chunks(rows):
        grad = grads[chunk].to(total.dtype)
        total += torch.where(grad == 0, 0.0, rows[chunk].to(total.dtype) * grad).sum()
    return total


def _columns(rows: Tensor) -> Iterator[slice]:
    """So many columns that sums of them in double precision stay small beside the rows."""
    return slices(rows.shape[1], max(COLUMNS // max(len(rows), 1), LEAST_COLUMNS))


def _wide(values: Tensor) -> torch.dtype:
    """What sums over keys are kept in; Apple's GPUs have no double precision."""
    return values.dtype if values.device.type == "mps" else torch.float64


def chunks(values: Tensor, beside: int = 0) -> Iterator[slice]:
    """The rows, so many at a time that they, or so many numbers ``beside`` each, stay in cache in double
    precision.
    """
    return _chunks(len(values), max(values.shape[1], beside))


def _chunks(rows: int, width: int) -> Iterator[slice]:
    return slices(rows, max(CHUNK // max(width, 1), 1))
