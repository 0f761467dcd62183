"""The passes that losses are put together from, each by the implementation that was chosen.

A pass of its own kernel takes that; a pass without one runs in plain PyTorch, tile by tile.
"""

from __future__ import annotations

from torch import Tensor

from wscl_fast import _ops, chunked
from wscl_fast.affinity import Affinity, has_factors
from wscl_fast.pairs import Meets, Pairs


def logsumexp(pairs: Pairs, meets: Meets, *, fused: bool, factor: float = 1.0) -> Tensor:
    """``log Σ e^{factor · S_ij}`` over the keys that query i meets, ``[N]``; −inf where there are none."""
    if not fused:
        return chunked.logsumexp(pairs, meets, factor)
    return _ops.logsumexp(pairs._replace(scale=factor * pairs.scale), meets)


def softmax(pairs: Pairs, meets: Meets, *, fused: bool) -> tuple[Tensor, Tensor]:
    """The same with factor 1, and the mean logit of every row under the softmax, without a gradient."""
    if not fused:
        return chunked.softmax(pairs, meets)
    return _ops.softmax(pairs, meets)


def softplus_sum(pairs: Pairs, meets: Meets, offset: Tensor, *, fused: bool) -> Tensor:
    """``Σ log(1 + e^{S_ij + offset_i})`` over the keys that query i meets, ``[N]``."""
    if not fused:
        return chunked.softplus_sum(pairs, meets, offset)
    return _ops.softplus_sum(pairs, offset, meets)


def two_way_logsumexp(pairs: Pairs, meets: Meets, *, fused: bool) -> tuple[Tensor, Tensor]:
    """:func:`logsumexp` of the queries over the keys, and of the keys over the queries; without own keys."""
    if not fused:
        return chunked.logsumexp(pairs, meets), chunked.logsumexp(pairs.swapped(), meets)
    return _ops.two_way_logsumexp(pairs, meets)


def weighted_sum(
    affinity: Affinity, query_auxiliary: Tensor, key_auxiliary: Tensor, values: Tensor, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """``W @ values`` ``[N, width]`` and ``W.sum(1)`` ``[N]`` float64, W the weights of all pairs."""
    if has_factors(affinity):
        return chunked.factor_product(affinity, query_auxiliary, key_auxiliary, values)
    if fused:
        return _ops.tag_weighted_sum(query_auxiliary, key_auxiliary, values, jaccard=affinity == "jaccard")
    return chunked.weighted_sum(affinity, query_auxiliary, key_auxiliary, values)
