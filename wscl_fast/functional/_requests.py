"""What losses ask of the pairs of queries and keys.

A loss is a formula of a few numbers for each query. Each is a :class:`Request`: a value over the keys that
the query meets, which can be had from blocks of the keys and joined. :mod:`wscl_fast.functional._passes`
answers where all keys are in one tensor; the ring of processes (:mod:`wscl_fast.distributed.ring`) where they
are not. A request of its own kernel takes that; one without runs in plain PyTorch, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from wscl_fast import _ops, chunked
from wscl_fast import affinity as affinities
from wscl_fast.affinity import Affinity, has_factors
from wscl_fast.matching import (
    allowed_count,
    allowed_sum,
    matching_count,
    matching_logits,
    matching_sum,
    own_not_finite,
    squared_lengths,
)
from wscl_fast.pairs import Meets, Pairs
from wscl_fast.values import may_look

KEYS = 16384  # copied at a time where rows have to be left out


@dataclass(frozen=True)
class Request:
    """A value for every query. The requests of one call share queries, keys and own keys."""

    pairs: Pairs

    joined: ClassVar[Literal["sum", "logsumexp", "largest"]] = "sum"  # over blocks of keys, value by value
    inputs: ClassVar[tuple[str, ...]] = ()  # fields that get a gradient, beside queries and keys
    of_queries: ClassVar[tuple[str, ...]] = ()  # fields with a row for each query, beside its vector and id
    of_keys: ClassVar[tuple[str, ...]] = ()  # the same of keys
    differentiable: ClassVar[bool] = True
    most: ClassVar[int | None] = 1 << 19  # numbers of queries at a time, where memory matters; None: all

    def here(self, fused: bool) -> Tensor:
        """The value over the keys of ``pairs``, ``[N]`` or ``[values, N]``."""
        raise NotImplementedError

    def of_rows(self, rows: slice) -> Request:
        """The same of some queries."""
        queries, query_ids, own = self.pairs.queries, self.pairs.query_ids, self.pairs.own
        own = None if own is None else own[rows]
        pairs = self.pairs._replace(queries=queries[rows], query_ids=query_ids[rows], own=own)
        fields: dict[str, Any] = {name: getattr(self, name)[rows] for name in self.of_queries}
        return replace(self, pairs=pairs, **fields)


@dataclass(frozen=True)
class LogSumExp(Request):
    """``log Σ e^{factor · S_ij}`` over the keys that query i meets; −inf where there are none."""

    meets: Meets = "all"
    factor: float = 1.0
    joined = "logsumexp"

    def here(self, fused: bool) -> Tensor:
        if not fused:
            return chunked.logsumexp(self.pairs, self.meets, self.factor)
        return _ops.logsumexp(self.scaled(), self.meets)

    def scaled(self) -> Pairs:
        """The pairs with the factor in their scale."""
        return self.pairs._replace(scale=self.factor * self.pairs.scale)


@dataclass(frozen=True)
class InBatchLogSumExp(LogSumExp):
    """:class:`LogSumExp` over the batch itself: queries are keys and have one id, or none, on both sides.

    Of a batch of one cluster the plain loss is ``lse_i − mean_j S_ij``, and its kernel takes half of the
    pairs; the mean needs no pass. A logit of −∞ leaves the log-sum-exp as it is but not the mean: then, where
    looking costs nothing, all pairs are taken (on a GPU such rows are NaN).
    """

    def here(self, fused: bool) -> Tensor:
        assert self.meets == "all"
        assert self.factor == 1
        if not fused:
            return super().here(fused)
        loss, count = fused_infonce(self.pairs, False, in_batch=True, sparing=True)
        mean = matching_logits(self.pairs) / count.clamp(min=1).to(loss.dtype)
        lse = torch.where(count > 0, loss + mean, -torch.inf)
        return super().here(fused) if may_look(lse) and bool(lse.isnan().any()) else lse


@dataclass(frozen=True)
class Softmax(LogSumExp):
    """``[2, N]``: the same, and each row's mean logit under the softmax, without a gradient."""

    def here(self, fused: bool) -> Tensor:
        assert self.factor == 1
        softmax = _ops.softmax if fused else chunked.softmax
        return torch.stack(softmax(self.pairs, self.meets))


@dataclass(frozen=True)
class Count(Request):
    """How many keys a query meets, int64."""

    meets: Literal["all", "same"] = "same"
    differentiable = False
    most = None

    def here(self, fused: bool) -> Tensor:
        return (allowed_count if self.meets == "all" else matching_count)(self.pairs)


@dataclass(frozen=True)
class LogitSum(Request):
    """``Σ S_ij`` over the keys of query i's id, without a pass over pairs."""

    def here(self, fused: bool) -> Tensor:
        return matching_logits(self.pairs)


@dataclass(frozen=True)
class SoftplusSum(Request):
    """``Σ log(1 + e^{S_ij + offset_i})`` over the keys that query i meets; S may have either sign."""

    meets: Meets
    offset: Tensor  # [N]
    inputs = ("offset",)
    of_queries = ("offset",)

    def here(self, fused: bool) -> Tensor:
        softplus_sum = _ops.softplus_sum if fused else chunked.softplus_sum
        return softplus_sum(self.pairs, self.offset, self.meets)


@dataclass(frozen=True)
class SigmoidLogSumExp(Request):
    """``log Σ σ(S_ij + offset_i)`` over the keys of query i's id; −inf where there are none."""

    offset: Tensor  # [N]
    joined = "logsumexp"
    inputs = ("offset",)
    of_queries = ("offset",)

    def here(self, fused: bool) -> Tensor:
        return chunked.logsumexp_of_logsigmoid(self.pairs, self.offset)


@dataclass(frozen=True)
class PairLosses(Request):
    """``Σ max(lse_i − S_ij, floor)`` over the keys of query i's id."""

    lse: Tensor  # [N]
    floor: Tensor  # 0-dim
    inputs = ("lse", "floor")
    of_queries = ("lse",)

    def here(self, fused: bool) -> Tensor:
        return chunked.pair_losses(self.pairs, self.lse, self.floor)


@dataclass(frozen=True)
class LargestPairLoss(Request):
    """``max(lse_i − S_ij)`` over the keys of query i's id; −inf where there are none."""

    lse: Tensor  # [N]
    joined = "largest"
    inputs = ("lse",)
    of_queries = ("lse",)

    def here(self, fused: bool) -> Tensor:
        return chunked.largest_pair_loss(self.pairs, self.lse)


@dataclass(frozen=True)
class AffinitySum(Request):
    """``[3, N]`` float64: ``Σ w_ij S_ij`` over the keys that query i may meet, ``Σ w_ij``, and what of the
    last was taken off for its own key. The weights have no gradient.
    """

    affinity: Affinity
    query_auxiliary: Tensor
    key_auxiliary: Tensor
    some_missing: bool  # whether there are keys without an id, which have no tags and no features
    of_queries = ("query_auxiliary",)
    of_keys = ("key_auxiliary",)

    def here(self, fused: bool) -> Tensor:
        keys = self.pairs.keys
        there, touched = self.there()
        pulled, total = weighted_sum(
            self.affinity, self.query_auxiliary, self.key_auxiliary, keys, there=there, fused=fused
        )
        taken = torch.zeros_like(total)
        if self.pairs.own is not None and len(keys):
            _, taken, own_keys = self.own_share(there, total.dtype)
            pulled = pulled - taken[:, None].to(keys.dtype) * own_keys
        logits = self.pairs.scale * (self.pairs.queries * pulled).sum(1)
        if touched is not None:
            logits = torch.where(touched, torch.nan, logits)
        return torch.stack([logits.to(total.dtype), total - taken, taken])

    def own_share(
        self, there: Tensor | None, dtype: torch.dtype, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of some queries' own keys their places, their weights, 0 where it is none of these keys, and their
        vectors, 0 where they are not in the sums.
        """
        keys, own = self.pairs.keys, self.pairs.own
        assert own is not None
        own = own[rows]
        place = own.clamp(min=0, max=len(keys) - 1)
        mine = None if there is None else there[place]
        of_own, own_keys = chunked.only(mine, self.key_auxiliary[place], keys.index_select(0, place))
        weight = affinities.own_weights(self.affinity, self.query_auxiliary[rows], of_own, dtype)
        return place, torch.where(own == place, weight, 0.0), own_keys

    def there(self) -> tuple[Tensor | None, Tensor | None]:
        """``[M, 2]``: which keys' auxiliaries, and which of their vectors, are in the sums; ``[N]``: which
        queries may meet a key whose vector is not. (An own key that is not finite could not be taken off.)
        """
        pairs = self.pairs
        has_id = pairs.key_ids != pairs.ignore_index
        if pairs.own is None or not len(pairs.keys):
            return has_id[:, None].expand(-1, 2) if self.some_missing else None, None
        left_out, touched = own_not_finite(pairs, pairs.keys)
        if not self.some_missing and _none_of(left_out):
            return None, None
        return torch.stack([has_id, has_id & ~left_out], 1), touched


@dataclass(frozen=True)
class AffinityLogSumExp(Request):
    """``[2, N]``: ``log Σ |w_ij| e^{S_ij}`` over the keys that query i may meet, of the weights above 0
    and of those below.
    """

    affinity: Affinity
    query_auxiliary: Tensor
    key_auxiliary: Tensor
    joined = "logsumexp"
    of_queries = ("query_auxiliary",)
    of_keys = ("key_auxiliary",)

    def here(self, fused: bool) -> Tensor:
        return chunked.weighted_logsumexp(self.affinity, self.query_auxiliary, self.key_auxiliary, self.pairs)


@dataclass(frozen=True)
class Similarities(Request):
    """``[6, N]`` float64, what statistics are made of: the number of positives, of keys of the query's kind
    and of all, the sums of ``S_ij`` over the positives and over the keys of other kinds, and the positives'
    sum of ``‖k_j‖²``.

    The ids of ``pairs`` say who is positive, these who is of a kind.
    """

    query_kinds: Tensor
    key_kinds: Tensor
    of_queries = ("query_kinds",)
    of_keys = ("key_kinds",)
    differentiable = False

    def here(self, fused: bool) -> Tensor:
        positive = self.pairs
        kinds = positive._replace(query_ids=self.query_kinds, key_ids=self.key_kinds)
        queries, keys = (positive.scale * positive.queries).double(), positive.keys
        pulled = (queries * matching_sum(positive, keys)).sum(1)
        pushed = (queries * (allowed_sum(kinds, keys) - matching_sum(kinds, keys))).sum(1)
        squares = matching_sum(positive, squared_lengths(keys)[:, None])[:, 0]
        counts = matching_count(positive), matching_count(kinds), allowed_count(kinds)
        return torch.stack([*(count.double() for count in counts), pulled, pushed, squares])


def fused_infonce(
    pairs: Pairs, inner: bool, *, in_batch: bool, reduction: _ops.Reduction = "none", sparing: bool = False
) -> tuple[Tensor, Tensor]:
    """The plain loss of every row and its count of positives, by a kernel of its own.

    ``in_batch`` says that queries are keys in every respect, where half of the pairs will do; ``reduction``
    that the losses' mean or sum will do, 0-dim, instead of them; ``sparing`` that other passes of the same
    loss need memory too.
    """
    own = pairs.own
    return _ops.clustered_infonce(
        pairs.queries,
        None if in_batch else pairs.keys,
        pairs.query_ids,
        None if in_batch else pairs.key_ids,
        None if in_batch else own,
        pairs.scale,
        exclude_self=in_batch and own is not None,
        inner=inner,
        ignore_index=pairs.ignore_index,
        reduction=reduction,
        sparing=sparing,
    )


def two_way_logsumexp(pairs: Pairs, meets: Meets, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the queries over the keys, and of the keys over the queries; without own keys."""
    if not fused:
        return chunked.logsumexp(pairs, meets), chunked.logsumexp(pairs.swapped(), meets)
    return _ops.two_way_logsumexp(pairs, meets)


def weighted_sum(
    affinity: Affinity,
    query_auxiliary: Tensor,
    key_auxiliary: Tensor,
    values: Tensor,
    *,
    there: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """``W @ values`` ``[N, width]`` and ``W.sum(1)`` ``[N]`` float64, W the weights of all pairs.

    ``there`` [M, 2] bool says which keys' auxiliaries, and which of their values, take part, whatever stands
    in the others' rows.
    """
    if fused and not has_factors(affinity):
        return _sum_by_tags(query_auxiliary, key_auxiliary, values, there, jaccard=affinity == "jaccard")
    compute = chunked.factor_product if has_factors(affinity) else chunked.weighted_sum
    return compute(affinity, query_auxiliary, key_auxiliary, values, there)


def _none_of(flags: Tensor) -> bool:
    """Whether none is set, as far as one may look."""
    return may_look(flags) and not bool(flags.any())


def _sum_by_tags(
    query_tags: Tensor, key_tags: Tensor, values: Tensor, there: Tensor | None, *, jaccard: bool
) -> tuple[Tensor, Tensor]:
    if there is None:
        return _ops.tag_weighted_sum(query_tags, key_tags, values, jaccard=jaccard)
    # A block of keys at a time, so that there is no second copy of all of them.
    parts = []
    for _, tags, block, mask in chunked.row_blocks(KEYS, key_tags, values, there):
        tags, block = chunked.only(mask, tags, block)
        parts.append(_ops.tag_weighted_sum(query_tags, tags, block, jaccard=jaccard))
    sums, totals = (torch.stack(part) for part in zip(*parts, strict=True))
    return sums.sum(0, dtype=torch.float64).to(values.dtype), totals.sum(0)
