"""Sums over the keys of each query's id, block by block, without a pass over pairs.

    sum_i = Σ_{j ∈ P(i)} k_j,   and for the keys  Σ_{i: j ∈ P(i)} v_i

One sum for each id, less what a query's own key adds. In double precision, a few thousand keys at a time, so
that a block in single precision is never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wscl_fast.pairs import Pairs

__all__ = ["Matching"]

CHUNK = 2048  # keys: in double precision they stay in a core's cache


class Matching:
    """The sums for one rank's queries, over the blocks of keys that were added so far."""

    def __init__(self, query_ids: Tensor, ignore_index: int, width: int) -> None:
        n = len(query_ids)
        self.query_ids, self.ignore_index = query_ids, ignore_index
        self.ordered = query_ids.sort().values
        # The sum of an id lies where the id first stands in order; slot n takes what belongs to no query.
        self.of_query = self._slots(query_ids)
        self.sums = torch.zeros(n + 1, width, dtype=torch.float64, device=query_ids.device)
        self.own_sum = torch.zeros(n, width, dtype=torch.float64, device=query_ids.device)

    def add(self, pairs: Pairs) -> None:
        """Add a block of keys."""
        slots = self._slots(pairs.key_ids)
        for chunk in _chunks(len(slots)):
            self.sums.index_add_(0, slots[chunk], pairs.keys[chunk].double())
        if pairs.own is not None and len(slots):
            rows, own = self._own(pairs)
            self.own_sum[rows] += pairs.keys[own].double()

    def sum(self) -> Tensor:
        """``[N, d]`` float64: the sum of these keys."""
        ignored = (self.query_ids == self.ignore_index)[:, None]
        return (self.sums[self.of_query] - self.own_sum).masked_fill(ignored, 0)

    def per_id(self, values: Tensor) -> Tensor:
        """``[N + 1, d]``: for every id the sum of its queries' rows of ``values [N, d]``."""
        sums = torch.zeros(len(values) + 1, values.shape[1], dtype=torch.float64, device=values.device)
        sums.index_add_(0, self.of_query, values.double())
        sums[-1] = 0
        return sums.to(values.dtype)

    def spread(self, grad: Tensor, pairs: Pairs, values: Tensor, per_id: Tensor) -> None:
        """Add to every key's row of ``grad [M, d]`` the ``values`` of the queries that have its id."""
        slots = self._slots(pairs.key_ids)
        for chunk in _chunks(len(slots)):
            grad[chunk] += per_id[slots[chunk]]
        if pairs.own is not None and len(slots):
            rows, own = self._own(pairs)
            grad.index_add_(0, own, values[rows], alpha=-1)

    def _slots(self, ids: Tensor) -> Tensor:
        none = len(self.ordered)
        if none == 0:
            return torch.zeros_like(ids)
        slots = torch.searchsorted(self.ordered, ids).clamp(max=none - 1)
        known = (self.ordered[slots] == ids) & (ids != self.ignore_index)
        return torch.where(known, slots, none)

    def _own(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The queries whose own key lies in the block with their id, and these keys."""
        assert pairs.own is not None
        own = pairs.own.clamp(min=0)
        alike = (pairs.own >= 0) & (pairs.key_ids[own] == self.query_ids)
        rows = (alike & (self.query_ids != self.ignore_index)).nonzero()[:, 0]
        return rows, own[rows]


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))
