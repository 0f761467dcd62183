"""What every pass over queries and keys reads: which vectors, which ids, and who must not meet whom."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Meets = Literal["all", "same", "other"]
_BLOCK = 65536  # keys summed at a time


class Pairs(NamedTuple):
    """Queries and keys, with ids that say who belongs together.

    Query i is *allowed* to meet key j if j has an id and is not i's own key. Of the allowed keys those with
    i's id are the *same* ones, the rest the *other* ones. A query without an id meets nothing.
    """

    queries: Tensor  # [N, d]
    keys: Tensor  # [M, d]
    query_ids: Tensor  # [N] int64
    key_ids: Tensor  # [M] int64
    own: Tensor | None  # [N] int64: the key that a query must not meet, −1 for none
    scale: Tensor  # 0-dim, 1 / temperature
    ignore_index: int = -1

    def folded(self) -> Pairs:
        """The scale folded into the queries, so that the passes' gradients meet before one is taken of it."""
        return self._replace(queries=self.scale * self.queries, scale=torch.ones_like(self.scale))

    def swapped(self) -> Pairs:
        """The keys as queries of the queries, where no one has an own key."""
        assert self.own is None
        return self._replace(
            queries=self.keys, keys=self.queries, query_ids=self.key_ids, key_ids=self.query_ids
        )

    def tile(self, meets: Meets, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The mask of one tile, ``[rows, columns]``: which pairs meet."""
        ids = self.key_ids[columns]
        allowed = (ids != self.ignore_index) & (self.query_ids[rows, None] != self.ignore_index)
        if self.own is not None:
            index = torch.arange(len(self.keys), device=ids.device)[columns]
            allowed = allowed & (index != self.own[rows, None])
        if meets == "all":
            return allowed
        same = self.query_ids[rows, None] == ids
        return allowed & (same if meets == "same" else ~same)


def matching_count(pairs: Pairs) -> Tensor:
    """How many keys of its own id each query may meet, ``[N]`` int64."""
    ids, own = pairs.query_ids, pairs.own
    ordered = pairs.key_ids.sort().values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    if own is not None:
        count = count - _own_is_same(pairs).to(count.dtype)
    return count.masked_fill(ids == pairs.ignore_index, 0)


def allowed_count(pairs: Pairs) -> Tensor:
    """How many keys each query may meet, ``[N]`` int64."""
    has_id = pairs.key_ids != pairs.ignore_index
    count = has_id.sum().expand(len(pairs.queries))
    if pairs.own is not None and len(has_id):
        own = pairs.own.clamp(min=0, max=len(has_id) - 1)
        count = count - (has_id[own] & (own == pairs.own)).to(count.dtype)
    return count.masked_fill(pairs.query_ids == pairs.ignore_index, 0)


def matching_sum(pairs: Pairs, values: Tensor) -> Tensor:
    """``Σ values_j`` over the keys of query i's id, ``[N, width]``, without a pass over pairs.

    One sum for each id, less the query's own key. Summed in double precision, block by block.
    """
    ids, own = pairs.query_ids, pairs.own
    n, m = len(ids), len(values)
    if n == 0 or m == 0:
        return values.new_zeros(n, m) @ values  # zero, and still part of the graph of gradients
    ordered = ids.sort().values
    slot = torch.searchsorted(ordered, pairs.key_ids).clamp(max=n - 1)
    known = (ordered[slot] == pairs.key_ids) & (pairs.key_ids != pairs.ignore_index)
    slot = torch.where(known, slot, n)  # the last slot takes the keys that no query asks for
    wide = values.dtype if values.device.type == "mps" else torch.float64
    sums = values.new_zeros(n + 1, values.shape[1], dtype=wide)
    for start in range(0, m, _BLOCK):
        block = slice(start, start + _BLOCK)
        sums = sums.index_add(0, slot[block], values[block].to(wide))
    result = sums.index_select(0, torch.searchsorted(ordered, ids))
    if own is not None:
        mine = values.index_select(0, own.clamp(min=0, max=m - 1)).to(wide)
        result = result - torch.where(_own_is_same(pairs)[:, None], mine, 0.0)
    return torch.where((ids != pairs.ignore_index)[:, None], result, 0.0).to(values.dtype)


def allowed_sum(pairs: Pairs, values: Tensor) -> Tensor:
    """``Σ values_j`` over the keys that query i may meet, ``[N, width]``, without a pass over pairs."""
    m = len(values)
    with_id = torch.where((pairs.key_ids != pairs.ignore_index)[:, None], values, 0.0).double()
    result = with_id.sum(0).expand(len(pairs.query_ids), values.shape[1])
    if pairs.own is not None and m:
        mine = with_id.index_select(0, pairs.own.clamp(min=0, max=m - 1))
        result = result - torch.where(((pairs.own >= 0) & (pairs.own < m))[:, None], mine, 0.0)
    return torch.where((pairs.query_ids != pairs.ignore_index)[:, None], result, 0.0)


def matching_logits(pairs: Pairs) -> Tensor:
    """``Σ S_ij`` over the keys of query i's id that it may meet, ``[N]``, without a pass over pairs."""
    return pairs.scale * (pairs.queries * matching_sum(pairs, pairs.keys)).sum(1)


def _own_is_same(pairs: Pairs) -> Tensor:
    """Whether a query's own key is one of its id, ``[N]`` bool."""
    own, m = pairs.own, len(pairs.key_ids)
    if own is None or m == 0:
        return torch.zeros_like(pairs.query_ids, dtype=torch.bool)
    return (own >= 0) & (own < m) & (pairs.key_ids[own.clamp(min=0, max=m - 1)] == pairs.query_ids)
