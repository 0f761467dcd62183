"""The definitions in plain PyTorch: oracle of the tests, last fallback, baseline of the benchmarks.

Every function here materialises the whole matrix and says what is computed in the fewest words;
:mod:`wscl_fast.chunked` and the fused kernels are held to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from wscl_fast.pairs import Meets, Pairs, present


def logits(pairs: Pairs) -> Tensor:
    """``S = scale * q @ k.T``, ``[N, M]``; 0 where a side has no id."""
    queries = present(pairs.queries, pairs.query_ids, pairs.ignore_index)
    keys = present(pairs.keys, pairs.key_ids, pairs.ignore_index)
    return pairs.scale.to(queries.dtype) * (queries @ keys.T)


def masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """``logsumexp`` of every row over the mask; −inf, with gradient zero, where it is empty."""
    empty = ~mask.any(1)
    masked = values.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0)
    return masked.logsumexp(1).masked_fill(empty, -torch.inf)


def logsumexp(pairs: Pairs, meets: Meets, factor: float = 1.0) -> Tensor:
    """``log Σ e^{factor · S_ij}`` over the keys that query i meets, ``[N]``; −inf where there are none."""
    return masked_logsumexp(factor * logits(pairs), pairs.tile(meets))


def softplus_sum(pairs: Pairs, meets: Meets, offset: Tensor) -> Tensor:
    """``Σ log(1 + e^{S_ij + offset_i})`` over the keys that query i meets, ``[N]``."""
    terms = -logsigmoid(-logits(pairs) - offset[:, None])  # softplus, without its switch to the line
    return terms.masked_fill(~pairs.tile(meets), 0).sum(1)


def clustered_infonce(
    positive: Pairs,
    negative: Pairs,
    *,
    inner: bool,
    denominator: str = "all",
    hardness: float = 0.0,
    prior: float = 0.0,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clustered InfoNCE of every row by its definition, in N × M memory.

    ``positive`` says by its ids which pairs are positives, ``negative`` which are negatives (the others).

    Returns:
        The loss of every row ``[N]``, zero where it takes no part, and its count of positives ``[N]``, int64.
    """
    is_positive, is_negative = positive.tile("same"), negative.tile("other")
    count, negatives = is_positive.sum(1), is_negative.sum(1)
    valid = count > 0
    if denominator == "decoupled":
        valid = valid & (negatives > 0)
    count = count.masked_fill(~valid, 0)
    # Rows that take no part keep finite logits, so that the zero gradient stays zero.
    s = logits(positive)
    share = 1 / count.clamp(min=1).to(s.dtype)
    mean_exponential = masked_logsumexp(s, is_positive) + share.log()

    mass = masked_logsumexp(s, is_negative)  # log Σ e^S over the negatives
    if hardness or prior:
        size = negatives.clamp(min=1).to(s.dtype).log()
        none = negatives == 0
        mean = masked_logsumexp((1 + hardness) * s, is_negative).masked_fill(none, 0)
        mean = mean - (masked_logsumexp(hardness * s, is_negative).masked_fill(none, 0) if hardness else size)
        if prior:
            assert floor is not None
            taken = math.log(prior) + mean_exponential
            left, low = log_difference(mean, taken) - math.log1p(-prior), floor.expand_as(mean)
            mean = torch.where(left <= low, low, left)
        mass = torch.where(negatives > 0, size + mean, -torch.inf)
    mass = torch.where(mass == -torch.inf, torch.finfo(s.dtype).min / 4, mass)

    if denominator == "other":
        per_pair = logsigmoid(s - mass[:, None])  # log e^S / (e^S + negatives)
        if inner:
            loss = -(masked_logsumexp(per_pair, is_positive) + share.log())
        else:
            loss = -per_pair.masked_fill(~is_positive, 0).sum(1) * share
    else:
        numerator = mean_exponential if inner else s.masked_fill(~is_positive, 0).sum(1) * share
        if denominator == "all":
            plain = not (hardness or prior)
            everything = masked_logsumexp(s, is_positive | is_negative)
            both = torch.stack([mass, masked_logsumexp(s, is_positive)])
            mass = everything if plain else both.logsumexp(0)
        loss = mass - numerator
    return torch.where(valid, loss, 0.0), count


def hierarchical_infonce(
    everyone: Pairs,
    levels: list[Pairs],
    *,
    inner: bool,
    by_pair: bool,
    largest: Callable[[Tensor], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Loss and count of positives of every row for each level, the coarsest first, in N × M memory.

    ``everyone`` says who is in the denominator, ``levels`` who is positive at each level. With ``by_pair``
    the loss of a pair is at least that of any pair of a finer level; ``largest`` gives the largest of a
    number ``[1]`` over all processes that share the loss.
    """
    s = logits(everyone)
    lse = masked_logsumexp(s, everyone.tile("all"))
    lse = lse.masked_fill(lse == -torch.inf, 0)
    rows: list[tuple[Tensor, Tensor]] = []
    worst = s.new_full((), -torch.inf)
    for pairs in reversed(levels):
        positive = pairs.tile("same")
        count = positive.sum(1)
        share = 1 / count.clamp(min=1).to(s.dtype)
        terms = lse[:, None] - s  # the loss of every pair
        if by_pair:
            terms = torch.maximum(terms, worst)
            here = torch.cat([terms[positive], s.new_full((1,), -torch.inf)]).amax(0, keepdim=True)
            worst = torch.maximum(worst, largest(here)[0])
        loss = terms.masked_fill(~positive, 0).sum(1) * share
        if inner:
            loss = lse - masked_logsumexp(s, positive) - share.log()
        rows.insert(0, (torch.where(count > 0, loss, 0.0), count))
    return rows


def signed_logsumexp(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``log Σ_j |w_ij| e^{S_ij}`` of every row over the weights above 0, and over those below."""
    return weighted_logsumexp(logits, weights), weighted_logsumexp(logits, -weights)


def weighted_logsumexp(logits: Tensor, weights: Tensor) -> Tensor:
    """``log Σ_j w_ij e^{S_ij}`` of every row over the weights above 0; −inf where there are none."""
    there = weights > 0
    return masked_logsumexp(logits + weights.masked_fill(~there, 1).log(), there)


def log_difference(a: Tensor, b: Tensor) -> Tensor:
    """``log(e^a − e^b)``; −inf, with gradient zero, where that is not above 0; NaN where unknown."""
    above = ~((a <= b) & (a < torch.inf))
    some = above & (b != -torch.inf)
    gap = torch.where(some, b - torch.where(some, a, 0.0), -1.0)
    shrunk = torch.where(some, torch.log1p(-gap.exp()), 0.0)
    return torch.where(above, a, 0.0).add(shrunk).masked_fill(~above, -torch.inf)


def soft_infonce(pairs: Pairs, weights: Tensor, *, inner: bool) -> tuple[Tensor, Tensor]:
    """InfoNCE whose positives have weights ``[N, M]``: the loss of every row, and which rows take part."""
    s, allowed = logits(pairs), pairs.tile("all")
    weights = weights.masked_fill(~allowed, 0)
    total = weights.sum(1)
    unknown = total.isnan()
    valid = (total > 0) | unknown
    lse = masked_logsumexp(s, allowed).masked_fill(~allowed.any(1), 0)
    if inner:
        mass = log_difference(*signed_logsumexp(s, weights))
        valid = valid & ((mass != -torch.inf) | unknown)
        numerator = mass.masked_fill(~valid, 0) - torch.where(valid, total, 1.0).log()
    else:
        numerator = (weights * s.masked_fill(~allowed, 0)).sum(1) / torch.where(valid, total, 1.0)
    return torch.where(valid, spoilt(lse - numerator, unknown), 0.0), valid


def spoilt(loss: Tensor, rows: Tensor) -> Tensor:
    """The loss with NaN in some rows, and in what of the gradients comes through them."""
    return loss * torch.where(rows, torch.nan, 1.0).to(loss.dtype)


def row_stats(
    positive: Pairs, negative: Pairs, scale: Tensor, *, everyone: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows of ``functional.statistics.RowStats`` by their definitions, in N × M memory."""
    s, is_positive, is_negative = logits(negative), positive.tile("same"), negative.tile("other")
    met = is_positive | is_negative if everyone else is_negative
    queries = positive.queries * (positive.scale / scale).expand(len(s))[:, None]
    similarity, distance = queries @ positive.keys.T, torch.cdist(queries, positive.keys).square()
    lse = masked_logsumexp(s, met)
    weights = (s - lse[:, None]).exp().masked_fill(~met, 0)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return values.masked_fill(~mask, 0).sum(1) / mask.sum(1)

    return (
        lse,
        met.sum(1),
        (weights * s).masked_fill(~met, 0).sum(1),
        mean(similarity, is_positive),
        mean(similarity, is_negative),
        mean(distance, is_positive),
    )


def distances(x: Tensor, centroids: Tensor, *, cosine: bool) -> Tensor:
    """Distance of every point from every centroid, float64 [N, K].

    ``‖x − c‖²``, or ``1 − cos(x, c)`` as half the squared distance of the unit vectors, which keeps its
    digits; the cosine of a zero vector, which has no direction, is 0.
    """
    x, centroids = x.double(), centroids.double()
    if cosine:
        x, centroids = _unit(x), _unit(centroids)
    squared = torch.stack([(x - c).square().sum(1) for c in centroids], 1)
    if not cosine:
        return squared
    undirected = (x == 0).all(1)[:, None] | (centroids == 0).all(1)
    return torch.where(undirected, 1.0, squared / 2)


def kmeans_assign(x: Tensor, centroids: Tensor, *, cosine: bool, top: int) -> tuple[Tensor, Tensor]:
    """The `top` nearest centroids of each point, of equals the lowest index, and their distances [N, top]."""
    distance, assignment = distances(x, centroids, cosine=cosine).sort(dim=1, stable=True)
    return assignment[:, :top], distance[:, :top]


def kmeans_update(
    x: Tensor,  # [N, d]
    centroids: Tensor,  # [K, d]
    *,
    weights: Tensor | None,  # [N]
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Nearest centroid and distance of each point, and the sums, counts and inertia of the clusters."""
    assignment, distance = kmeans_assign(x, centroids, cosine=cosine, top=1)
    member = torch.nn.functional.one_hot(assignment[:, 0], len(centroids)).T  # [K, N]
    share = torch.ones(len(x), dtype=torch.float64, device=x.device) if weights is None else weights.double()
    sums = (member * share) @ (_unit(x.double()) if cosine else x.double())
    counts = member.sum(1) if weights is None else member.double() @ share
    return assignment[:, 0], distance[:, 0], sums, counts, (share * distance[:, 0]).sum()


def _unit(x: Tensor) -> Tensor:
    if not x.shape[1]:  # nothing has no largest number
        return x
    x = torch.nn.functional.normalize(x, p=torch.inf, eps=torch.finfo(x.dtype).tiny)
    return torch.nn.functional.normalize(x, eps=torch.finfo(x.dtype).tiny)
