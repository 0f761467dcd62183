"""Sums over pairs that have a weight, tile by tile; the weights are made within the tile.

Nothing of the size of N × M is kept: each tile is a checkpoint, as in :mod:`wscl_fast.chunked.infonce`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wscl_fast import affinity as affinities
from wscl_fast.affinity import Affinity
from wscl_fast.chunked.infonce import COLUMNS, ROWS, blocks
from wscl_fast.pairs import Pairs
from wscl_fast.reference import masked_logsumexp, signed_logsumexp

FACTOR_ROWS = 8192  # rows unpacked to factors at a time


def factor_product(
    affinity: Affinity, query_auxiliary: Tensor, key_auxiliary: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """``W @ values`` and ``W.sum(1)`` of weights that are products of two factors, in O((N + M) r d).

    In double precision, like the sums over clusters.
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64

    def gather(auxiliary: Tensor, block: Tensor) -> Tensor:
        vectors = affinities.factors(affinity, auxiliary, wide)
        return torch.cat([vectors.T @ block.to(wide), vectors.sum(0)[:, None]], 1)

    def spread(auxiliary: Tensor, sums: Tensor) -> Tensor:
        return affinities.factors(affinity, auxiliary, wide) @ sums

    sums = torch.stack(
        [_again(gather, key_auxiliary[rows], values[rows]) for rows in blocks(0, len(values), FACTOR_ROWS)]
    ).sum(0)
    result = torch.cat(
        [_again(spread, query_auxiliary[rows], sums) for rows in blocks(0, len(query_auxiliary), FACTOR_ROWS)]
    )
    return result[:, :-1].to(values.dtype), result[:, -1]


def weighted_sum(
    affinity: Affinity, query_auxiliary: Tensor, key_auxiliary: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """``W @ values`` and ``W.sum(1)``, for any weights."""
    dtype = values.dtype

    def tile(query_tags: Tensor, key_tags: Tensor, values: Tensor) -> Tensor:
        weights = affinities.weights(affinity, query_tags, key_tags, dtype)
        return torch.cat([weights @ values, weights.sum(1, keepdim=True)], 1)

    parts = []
    for rows in blocks(0, len(query_auxiliary), ROWS):
        tiles = [
            _again(tile, query_auxiliary[rows], key_auxiliary[columns], values[columns])
            for columns in blocks(0, len(values), COLUMNS)
        ]
        parts.append(torch.stack(tiles).sum(0, dtype=torch.float64))
    result = torch.cat(parts)
    return result[:, :-1].to(dtype), result[:, -1]


def weighted_logsumexp(
    affinity: Affinity, query_auxiliary: Tensor, key_auxiliary: Tensor, pairs: Pairs
) -> Tensor:
    """``log Σ |w_ij| e^{S_ij}`` over the keys that query i may meet, of the weights above 0 and of those
    below, ``[2, N]``; −inf where there are none.
    """

    def tile(q: Tensor, k: Tensor, scale: Tensor, of_q: Tensor, of_k: Tensor, mask: Tensor) -> Tensor:
        weights = affinities.weights(affinity, of_q, of_k, q.dtype).masked_fill(~mask, 0)
        return torch.stack(signed_logsumexp(scale * (q @ k.T), weights))

    results = []
    for rows in blocks(0, len(pairs.queries), ROWS):
        tiles = []
        for columns in blocks(0, len(pairs.keys), COLUMNS):
            inputs = (pairs.queries[rows], pairs.keys[columns], pairs.scale)
            auxiliary = (query_auxiliary[rows], key_auxiliary[columns])
            tiles.append(_again(tile, *inputs, *auxiliary, pairs.tile("all", rows, columns)))
        results.append(torch.stack([_logsumexp(parts) for parts in torch.stack(tiles, -1)]))
    return torch.cat(results, 1)


def _logsumexp(parts: Tensor) -> Tensor:
    return masked_logsumexp(parts, parts != -torch.inf)


def _again(function, *inputs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """The function, computed again for the backward pass instead of kept."""
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
