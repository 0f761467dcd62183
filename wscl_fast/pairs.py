"""What every pass over queries and keys reads: which vectors, which ids, and who must not meet whom."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Meets = Literal["all", "same", "other"]


def present(rows: Tensor, ids: Tensor, ignore_index: int) -> Tensor:
    """The rows, zero where there is no id: whatever stands there, even NaN, has no part in a product."""
    return torch.where((ids != ignore_index)[:, None], rows, 0.0)


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
        queries = self.queries
        if self.scale.requires_grad:  # which rows without an id have no part in
            queries = present(queries, self.query_ids, self.ignore_index)
        return self._replace(queries=self.scale * queries, scale=torch.ones_like(self.scale))

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
            first = columns.start or 0
            index = torch.arange(first, first + len(ids), device=ids.device)
            allowed = allowed & (index != self.own[rows, None])
        if meets == "all":
            return allowed
        same = self.query_ids[rows, None] == ids
        return allowed & (same if meets == "same" else ~same)
