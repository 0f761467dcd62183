"""How much two samples have in common: weights of pairs out of tag sets or continuous vectors.

Tag sets are packed bit masks, ``[N, W]`` int64: tag t of a sample is bit t mod 64 of its word t // 64.

    "shared"   1 if a ∩ b is not empty, else 0
    "count"    |a ∩ b|
    "jaccard"  |a ∩ b| / |a ∪ b|
    "cosine"   |a ∩ b| / √(|a| |b|)
    "kernel"   ⟨u, v⟩ of vectors

"count", "cosine" and "kernel" are products of two factors, so that sums over them need no pass over pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Affinity = Literal["shared", "count", "jaccard", "cosine", "kernel"]

WORD = 64  # tags in a word


def unpack(tags: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of ``[N, W]`` masks as zeros and ones ``[N, 64 W]``."""
    bits = torch.arange(WORD, device=tags.device)
    return ((tags[:, :, None] >> bits) & 1).flatten(1).to(dtype)


def width(affinity: Affinity, auxiliary: Tensor) -> int:
    """How many numbers a row of auxiliary information is spread out into."""
    return auxiliary.shape[1] * (1 if affinity == "kernel" else WORD)


def has_factors(affinity: Affinity) -> bool:
    """Whether the weight of a pair is the product of two vectors."""
    return affinity in ("count", "cosine", "kernel")


def factors(affinity: Affinity, auxiliary: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors ``[N, r]`` whose products are the weights."""
    if affinity == "kernel":
        return auxiliary.to(dtype)
    bits = unpack(auxiliary, dtype)
    if affinity == "count":
        return bits
    return bits / bits.sum(1, keepdim=True).clamp(min=1).sqrt()


def weights(affinity: Affinity, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of every pair, ``[N, M]``, by definition."""
    if has_factors(affinity):
        return factors(affinity, queries, dtype) @ factors(affinity, keys, dtype).T
    a, b = unpack(queries, dtype), unpack(keys, dtype)
    return _of_sets(affinity, a @ b.T, a.sum(1)[:, None], b.sum(1))


def own_weights(affinity: Affinity, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of each query and the key in the same row, ``[N]``."""
    if has_factors(affinity):
        return (factors(affinity, queries, dtype) * factors(affinity, keys, dtype)).sum(1)
    a, b = unpack(queries, dtype), unpack(keys, dtype)
    return _of_sets(affinity, (a * b).sum(1), a.sum(1), b.sum(1))


def _of_sets(affinity: Affinity, common: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if affinity == "shared":
        return (common > 0).to(common.dtype)
    return common / (a + b - common).clamp(min=1)
