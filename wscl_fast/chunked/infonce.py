"""The passes in plain PyTorch with memory linear in N + M, for any device, any dtype, any derivative.

A pass is cut into tiles of at most ``ROWS × COLUMNS`` logits. Each tile is a checkpoint: the backward pass
computes it again instead of keeping it, so peak memory does not grow with N × M, and second derivatives come
by themselves. Where only pairs of one id meet, rows and columns are put in the order of their ids first, and
a block of rows meets no more than the range of keys that its ids span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from wscl_fast.pairs import Meets, Pairs
from wscl_fast.reference import masked_logsumexp

ROWS = 1024
COLUMNS = 4096
SORTED_ROWS = 128  # fewer rows span fewer ids, and so a narrower range of keys

# From the logits of a tile, the mask of the pairs that meet and what is given for the rows: a value a row, or
# several, ``[values, rows]``.
TileFunction = Callable[..., Tensor]


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


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """The slices of a range, at least one: an empty tile keeps the graph of gradients whole."""
    return (slice(i, min(i + step, stop)) for i in range(start, max(stop, start + 1), step))


def _reduce(
    pairs: Pairs, meets: Meets, function: TileFunction, join: Callable[[Tensor], Tensor], *vectors: Tensor
) -> Tensor:
    """A value for every row: the function on each tile, joined over the tiles of a row."""
    if meets == "same" and not torch.compiler.is_compiling():  # the ranges depend on the ids' values
        return _reduce_by_id(pairs, function, join, *vectors)
    rows = blocks(0, len(pairs.queries), ROWS)
    columns = slice(0, len(pairs.keys))
    return torch.cat([_row_block(pairs, meets, function, join, r, columns, *vectors) for r in rows], -1)


def _reduce_by_id(
    pairs: Pairs, function: TileFunction, join: Callable[[Tensor], Tensor], *vectors: Tensor
) -> Tensor:
    """The same over pairs of one id, rows and columns in the order of their ids."""
    query_order = pairs.query_ids.argsort(stable=True)
    key_order = pairs.key_ids.argsort(stable=True)
    own = pairs.own
    if own is not None and len(key_order):
        place = key_order.argsort()
        own = torch.where(own < 0, -1, place[own.clamp(min=0, max=len(place) - 1)])[query_order]
    query_ids, key_ids = pairs.query_ids[query_order], pairs.key_ids[key_order]
    ordered = pairs._replace(
        queries=pairs.queries.index_select(0, query_order),
        keys=pairs.keys.index_select(0, key_order),
        query_ids=query_ids,
        key_ids=key_ids,
        own=own,
    )
    vectors = tuple(vector.index_select(0, query_order) for vector in vectors)
    low = torch.searchsorted(key_ids, query_ids).tolist()
    high = torch.searchsorted(key_ids, query_ids, right=True).tolist()
    results = []
    for rows in blocks(0, len(query_ids), SORTED_ROWS):
        columns = slice(low[rows.start], high[rows.stop - 1]) if low else slice(0, 0)
        results.append(_row_block(ordered, "same", function, join, rows, columns, *vectors))
    return torch.cat(results, -1).index_select(-1, query_order.argsort())


def _row_block(
    pairs: Pairs,
    meets: Meets,
    function: TileFunction,
    join: Callable[[Tensor], Tensor],
    rows: slice,
    columns: slice,
    *vectors: Tensor,
) -> Tensor:
    parts = []
    for block in blocks(columns.start, columns.stop, COLUMNS):

        def tile(q: Tensor, k: Tensor, scale: Tensor, *of_rows: Tensor, block: slice = block) -> Tensor:
            return function(scale * (q @ k.T), pairs.tile(meets, rows, block), *of_rows)

        inputs = (pairs.queries[rows], pairs.keys[block], pairs.scale, *(v[rows] for v in vectors))
        parts.append(checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=False))
    return join(torch.stack(parts))
