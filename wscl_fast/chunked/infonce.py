"""The passes in plain PyTorch with memory linear in N + M, for any device, any dtype, any derivative.

A pass is cut into tiles of logits (:func:`tile_shape`). Each tile is a checkpoint: the backward pass
computes it again instead of keeping it, so peak memory does not grow with N × M, and second derivatives come
by themselves. Where only pairs of one id meet, rows and columns are put in the order of their ids first, and
a block of rows meets no more than the range of keys that its ids span.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from wscl_fast.pairs import Meets, Pairs, present
from wscl_fast.reference import masked_logsumexp
from wscl_fast.slices import slices
from wscl_fast.values import Unchanged

SORTED_ROWS = 128  # fewer rows span fewer ids, and so a narrower range of keys

# From the logits of a tile, the mask of the pairs that meet and what is given for the rows: a value a row, or
# several, ``[values, rows]``.
TileFunction = Callable[..., Tensor]

# A block of keys: where it lies, and the keys. The blocks are split off together: a slice of its own would
# have a gradient of the size of all keys. (A class of it would bind a traced graph to the number of keys.)
Tile = tuple[slice, Tensor]


def logsumexp(pairs: Pairs, meets: Meets, factor: float = 1.0) -> Tensor:
    """``log Σ e^{factor · S_ij}`` over the keys that query i meets, ``[N]``; −inf where there are none."""

    def tile(logits: Tensor, mask: Tensor) -> Tensor:
        return masked_logsumexp(factor * logits, mask)

    return _reduce(pairs, meets, tile, _join_logsumexp)


def softmax(pairs: Pairs, meets: Meets) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row as :func:`logsumexp`, and its mean logit under the softmax (0 if empty)."""

    def tile(logits: Tensor, mask: Tensor) -> Tensor:
        lse = masked_logsumexp(logits, mask)
        weights = (logits.detach() - lse.detach()[:, None]).exp().masked_fill(~mask, 0)
        return torch.stack([lse, (weights * logits.detach()).masked_fill(~mask, 0).sum(1)])

    lse, mean = _reduce(pairs, meets, tile, _join_softmax)
    return lse, mean.detach()


def softplus_sum(pairs: Pairs, offset: Tensor, meets: Meets) -> Tensor:
    """``Σ log(1 + e^{S_ij + offset_i})`` over the keys that query i meets, ``[N]``."""

    def tile(logits: Tensor, mask: Tensor, offset: Tensor) -> Tensor:
        return -logsigmoid(-logits - offset[:, None]).masked_fill(~mask, 0).sum(1)

    return _reduce(pairs, meets, tile, _join_sum, offset)


def logsumexp_of_logsigmoid(pairs: Pairs, offset: Tensor) -> Tensor:
    """``log Σ σ(S_ij + offset_i)`` over the keys of query i's id, ``[N]``; −inf where there are none."""

    def tile(logits: Tensor, mask: Tensor, offset: Tensor) -> Tensor:
        return masked_logsumexp(logsigmoid(logits + offset[:, None]), mask)

    return _reduce(pairs, "same", tile, _join_logsumexp, offset)


def pair_losses(pairs: Pairs, lse: Tensor, floor: Tensor) -> Tensor:
    """``Σ max(lse_i − S_ij, floor)`` over the keys of query i's id, ``[N]``, for a floor that is 0-dim."""

    def tile(logits: Tensor, mask: Tensor, lse: Tensor, floor: Tensor) -> Tensor:
        return torch.maximum(lse[:, None] - logits, floor[:, None]).masked_fill(~mask, 0).sum(1)

    return _reduce(pairs, "same", tile, _join_sum, lse, floor.expand_as(lse))


def largest_pair_loss(pairs: Pairs, lse: Tensor) -> Tensor:
    """``max(lse_i − S_ij)`` over the keys of query i's id, ``[N]``; −inf where there are none."""

    def tile(logits: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        terms = (lse[:, None] - logits).masked_fill(~mask, -torch.inf)
        return terms.amax(1) if terms.shape[1] else lse - torch.inf

    return _reduce(pairs, "same", tile, _join_largest, lse)


def _join_largest(parts: Tensor) -> Tensor:
    return parts.amax(0)


def _join_logsumexp(parts: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return masked_logsumexp(parts.T, (parts != -torch.inf).T)


def _join_softmax(parts: Tensor) -> Tensor:
    """Of ``[tiles, 2, rows]``: the tiles' mean logits by their shares of the mass."""
    lse = _join_logsumexp(parts[:, 0])
    share = (parts[:, 0] - lse.masked_fill(lse == -torch.inf, 0)).exp()
    return torch.stack([lse, (share * parts[:, 1]).sum(0)])


def _join_sum(parts: Tensor) -> Tensor:
    return parts.sum(0)


def tile_shape(like: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile at most: what stays in cache on a CPU, and occupies a GPU."""
    return (256, 2048) if like.device.type == "cpu" else (1024, 4096)


def _reduce(
    pairs: Pairs, meets: Meets, function: TileFunction, join: Callable[[Tensor], Tensor], *vectors: Tensor
) -> Tensor:
    """A value for every row: the function on each tile, joined over the tiles of a row."""
    if meets == "same" and not torch.compiler.is_compiling():  # the ranges depend on the ids' values
        return _reduce_by_id(pairs, function, join, *vectors)
    most_rows, most_columns = tile_shape(pairs.queries)
    tiles: list[Tile] = list(row_blocks(most_columns, pairs.keys))
    rows = row_blocks(most_rows, pairs.queries, *vectors)
    return torch.cat([_row_block(pairs, meets, function, join, tiles, *of_rows) for of_rows in rows], -1)


def _reduce_by_id(
    pairs: Pairs, function: TileFunction, join: Callable[[Tensor], Tensor], *vectors: Tensor
) -> Tensor:
    """The same over pairs of one id, rows and columns in the order of their ids."""
    query_order = pairs.query_ids.argsort(stable=True)
    key_order = pairs.key_ids.argsort(stable=True)
    own = pairs.own
    if own is not None and len(key_order):
        place = key_order.argsort()
        there = (own >= 0) & (own < len(place))
        own = torch.where(there, place[own.where(there, 0)], -1)[query_order]
    query_ids, key_ids = pairs.query_ids[query_order], pairs.key_ids[key_order]
    ordered = pairs._replace(
        queries=pairs.queries.index_select(0, query_order),
        keys=pairs.keys.index_select(0, key_order),
        query_ids=query_ids,
        key_ids=key_ids,
        own=own,
    )
    low = torch.searchsorted(key_ids, query_ids).tolist()
    high = torch.searchsorted(key_ids, query_ids, right=True).tolist()
    # The keys are cut wherever a block of rows begins or ends to meet them.
    ranges = [
        (low[rows.start], high[rows.stop - 1]) if low else (0, 0)
        for rows in slices(len(query_ids), SORTED_ROWS)
    ]
    step = tile_shape(pairs.queries)[1]
    cuts = sorted({0, *(cut for start, stop in ranges for cut in (*range(start, stop, step), stop))})
    tiles = _cut(ordered.keys, cuts)
    none = slice(0, 0), tiles[0][1][:0]
    vectors = tuple(vector.index_select(0, query_order) for vector in vectors)
    results = []
    for (start, stop), of_rows in zip(
        ranges, row_blocks(SORTED_ROWS, ordered.queries, *vectors), strict=True
    ):
        met = tiles[bisect_left(cuts, start) : bisect_left(cuts, stop)] or [none]
        results.append(_row_block(ordered, "same", function, join, met, *of_rows))
    return torch.cat(results, -1).index_select(-1, query_order.argsort())


def _cut(keys: Tensor, starts: list[int]) -> list[Tile]:
    """The keys cut at these places."""
    columns = [slice(*ends) for ends in zip(starts, [*starts[1:], len(keys)], strict=True)]
    parts = torch.split(keys, [c.stop - c.start for c in columns])
    return list(zip(columns, parts, strict=True))


def row_blocks(step: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """The range of each block of rows, and these of every tensor; at least one block."""
    size = len(tensors[0])
    parts = ([tensor] if size <= step else torch.split(tensor, step) for tensor in tensors)
    return zip(slices(size, step), *parts, strict=True)


def _row_block(
    pairs: Pairs,
    meets: Meets,
    function: TileFunction,
    join: Callable[[Tensor], Tensor],
    tiles: list[Tile],
    rows: slice,
    queries: Tensor,
    *vectors: Tensor,
) -> Tensor:
    parts = []
    for columns, keys in tiles:

        def tile(q: Tensor, k: Tensor, scale: Tensor, *of_rows: Tensor, columns: slice = columns) -> Tensor:
            logits = scale * logits_of(pairs, q, k, rows, columns)
            return function(logits, pairs.tile(meets, rows, columns), *of_rows)

        parts.append(again(tile, queries, keys, pairs.scale, *vectors, ids=pairs[2:5]))
    return join(torch.stack(parts))


def logits_of(pairs: Pairs, queries: Tensor, keys: Tensor, rows: slice, columns: slice) -> Tensor:
    """The products of these queries and keys of the pairs, 0 where a side has no id."""
    queries = present(queries, pairs.query_ids[rows], pairs.ignore_index)
    return queries @ present(keys, pairs.key_ids[columns], pairs.ignore_index).T


def again(  # type: ignore[no-untyped-def]
    function, *inputs: Tensor, ids: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """The function, computed again for the backward pass instead of kept; beside its inputs it reads ids."""
    unchanged = Unchanged(*inputs, *ids)

    def checked(*inputs: Tensor) -> Tensor:
        unchanged.check()
        made: Tensor = function(*inputs)
        return made

    result: Tensor = checkpoint(checked, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
