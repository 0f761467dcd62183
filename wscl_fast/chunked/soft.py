"""Sums over pairs that have a weight, tile by tile; the weights are made within the tile.

Nothing of the size of N × M is kept: each tile is a checkpoint, as in :mod:`wscl_fast.chunked.infonce`.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from wscl_fast import affinity as affinities
from wscl_fast import reference
from wscl_fast.affinity import Affinity
from wscl_fast.chunked.infonce import again, logits_of, row_blocks, tile_shape
from wscl_fast.pairs import Pairs

FACTOR_NUMBERS = 1 << 18  # of values, or of factors that weigh them, in double precision at a time


def factor_product(
    affinity: Affinity,
    query_auxiliary: Tensor,
    key_auxiliary: Tensor,
    values: Tensor,
    there: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``W @ values`` and ``W.sum(1)`` of weights that are products of two factors, in O((N + M) r d).

    In double precision, like the sums over clusters. ``there`` [M, 2] bool says which keys' auxiliaries, and
    which of their values, have a part in it.
    """

    def gather(auxiliary: Tensor, block: Tensor, there: Tensor | None = None) -> Tensor:
        return _gathered(affinity, auxiliary, block, there)

    def spread(auxiliary: Tensor, sums: Tensor) -> Tensor:
        return affinities.factors(affinity, auxiliary, sums.dtype) @ sums

    step = _step(values, affinities.width(affinity, key_auxiliary))
    of_keys = (key_auxiliary, values) if there is None else (key_auxiliary, values, there)
    # One by one: each is as large as all factors of a block.
    sums = reduce(torch.add, (again(gather, *rows) for _, *rows in row_blocks(step, *of_keys)))
    result = torch.cat(
        [again(spread, of_queries, sums) for _, of_queries in row_blocks(step, query_auxiliary)]
    )
    return result[:, :-1].to(values.dtype), result[:, -1]


def factor_sums(affinity: Affinity, auxiliary: Tensor, values: Tensor, there: Tensor | None = None) -> Tensor:
    """``[r, width + 1]`` in double precision: for each factor the sum of the values that it weighs, and its
    own; without a graph. Times the factors of other rows it is what :func:`factor_product` gives.
    """
    sums: Tensor | None = None
    of_rows = (auxiliary, values) if there is None else (auxiliary, values, there)
    for _, *rows in row_blocks(_step(values, affinities.width(affinity, auxiliary)), *of_rows):
        part = _gathered(affinity, *rows)
        sums = part if sums is None else sums.add_(part)
    assert sums is not None
    return sums


def _gathered(affinity: Affinity, auxiliary: Tensor, values: Tensor, there: Tensor | None = None) -> Tensor:
    auxiliary, values = only(there, auxiliary, values)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    vectors = affinities.factors(affinity, auxiliary, wide)
    return torch.cat([vectors.T @ values.to(wide), vectors.sum(0)[:, None]], 1)


def _step(values: Tensor, factors: int) -> int:
    return max(FACTOR_NUMBERS // max(values.shape[1], factors, 1), 256)


def weighted_sum(
    affinity: Affinity,
    query_auxiliary: Tensor,
    key_auxiliary: Tensor,
    values: Tensor,
    there: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of any weights, tile by tile."""
    dtype = values.dtype

    def tile(query_tags: Tensor, key_tags: Tensor, values: Tensor, there: Tensor | None = None) -> Tensor:
        key_tags, values = only(there, key_tags, values)
        weights = affinities.weights(affinity, query_tags, key_tags, dtype)
        return torch.cat([weights @ values, weights.sum(1, keepdim=True)], 1)

    of_keys = (key_auxiliary, values) if there is None else (key_auxiliary, values, there)
    most_rows, most_columns = tile_shape(values)
    columns = [block for _, *block in row_blocks(most_columns, *of_keys)]
    parts = []
    for _, tags in row_blocks(most_rows, query_auxiliary):
        tiles = [again(tile, tags, *block) for block in columns]
        parts.append(torch.stack(tiles).sum(0, dtype=torch.float64))
    result = torch.cat(parts)
    return result[:, :-1].to(dtype), result[:, -1]


def only(there: Tensor | None, auxiliary: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with zeros for the rows that are not there: ``[rows, 2]`` bool, of the one and of the other."""
    if there is None:
        return auxiliary, values
    one, other = there[:, :1], there[:, 1:]
    return (
        torch.where(one, auxiliary, torch.zeros_like(auxiliary)),
        torch.where(other, values, torch.zeros_like(values)),
    )


def weighted_logsumexp(
    affinity: Affinity, query_auxiliary: Tensor, key_auxiliary: Tensor, pairs: Pairs
) -> Tensor:
    """``log Σ |w_ij| e^{S_ij}`` over the keys that query i may meet, of the weights above 0 and of those
    below, ``[2, N]``; −inf where there are none.
    """
    most_rows, most_columns = tile_shape(pairs.queries)
    blocks_of_keys = list(row_blocks(most_columns, pairs.keys, key_auxiliary))
    results = []
    for rows, q, of_q in row_blocks(most_rows, pairs.queries, query_auxiliary):
        tiles = []
        for columns, k, of_k in blocks_of_keys:
            place = (rows, columns)

            def tile(
                q: Tensor, k: Tensor, scale: Tensor, of_q: Tensor, of_k: Tensor, place: Any = place
            ) -> Tensor:
                weights = affinities.weights(affinity, of_q, of_k, q.dtype)
                weights = weights.masked_fill(~pairs.tile("all", *place), 0)
                logits = scale * logits_of(pairs, q, k, *place)
                if affinity == "kernel":  # of tags no weight is below 0
                    return torch.stack(reference.signed_logsumexp(logits, weights))
                above = reference.weighted_logsumexp(logits, weights)
                return torch.stack([above, torch.full_like(above, -torch.inf)])

            tiles.append(again(tile, q, k, pairs.scale, of_q, of_k, ids=pairs[2:5]))
        results.append(torch.stack([_logsumexp(parts) for parts in torch.stack(tiles, -1)]))
    return torch.cat(results, 1)


def _logsumexp(parts: Tensor) -> Tensor:
    return reference.masked_logsumexp(parts, parts != -torch.inf)
