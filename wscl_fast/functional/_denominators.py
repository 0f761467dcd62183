"""Clustered InfoNCE with any denominator, put together from log-sum-exps and sums over clusters.

With n_i the logarithm of the mass of i's negatives (their Σ e^S, or an estimate of it), L_i that of its
positives and S̄_i the mean logit of its positives ("out") or the logarithm of their mean exponential ("in"):

    "all"        log(e^{n_i} + e^{L_i}) − S̄_i
    "other"      −1/|P| Σ_{j ∈ P} log σ(S_ij − n_i)   ("out"),   −log 1/|P| Σ_{j ∈ P} σ(S_ij − n_i)   ("in")
    "decoupled"  n_i − S̄_i

Only n_i needs a pass over all pairs; the rest lives on pairs of one cluster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from wscl_fast import chunked
from wscl_fast.functional._passes import logsumexp, softmax, softplus_sum
from wscl_fast.functional.statistics import RowStats, row_stats
from wscl_fast.pairs import Pairs, allowed_count, matching_count, matching_mean


def composed_infonce(
    positive: Pairs,
    negative: Pairs,
    *,
    fused: bool,
    inner: bool,
    denominator: str,
    hardness: float,
    prior: float,
    floor: Tensor,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor, RowStats | None]:
    """Loss and positives' count of every row, as ``reference.clustered_infonce`` defines them.

    With ``need_stats`` the rows' statistics as well. They cost no pass of their own but where there is
    hardness, which looks at the logits at other scales.
    """
    queries, one = positive.folded().queries, torch.ones_like(positive.scale)
    positive = positive._replace(queries=queries, scale=one)
    negative = negative._replace(queries=queries, scale=one)
    count = matching_count(positive)
    log_count = count.clamp(min=1).to(queries.dtype).log()
    everyone = denominator == "all" and not (hardness or prior)
    # The positives' log-mean-exp, where it is needed.
    pooled = (inner and denominator != "other") or prior > 0 or (denominator == "all" and not everyone)
    mean_exponential = -log_count
    if pooled:
        mean_exponential = logsumexp(positive, "same", fused=fused).masked_fill(count == 0, 0) - log_count
    plain, stats = None, None
    if need_stats:
        plain, mean_logit = softmax(negative, "all" if everyone else "other", fused=fused)
        stats = row_stats(positive, negative, plain, mean_logit, -floor.detach(), everyone=everyone)
    if everyone:
        mass = logsumexp(negative, "all", fused=fused) if plain is None else plain
    else:
        mass = _negative_mass(negative, plain, mean_exponential, hardness, prior, floor, fused=fused)
    if denominator == "decoupled":  # without a negative there is nothing to be told apart from
        count = count.masked_fill(mass == -torch.inf, 0)
    mass = mass.masked_fill(mass == -torch.inf, torch.finfo(mass.dtype).min / 4)

    if denominator == "other" and inner:
        loss = log_count - chunked.logsumexp_of_logsigmoid(positive, -mass)
    elif denominator == "other":
        turned = positive._replace(queries=-positive.queries)
        loss = softplus_sum(turned, "same", mass, fused=fused) / count.clamp(min=1).to(mass.dtype)
    else:
        numerator = mean_exponential if inner else matching_mean(positive)[0]
        if denominator == "all" and not everyone:
            pooled_mass = mean_exponential + log_count
            mass = pooled_mass - logsigmoid(pooled_mass - mass)
        loss = mass - numerator
    return torch.where(count > 0, loss, 0.0), count, stats


def _negative_mass(
    pairs: Pairs,
    plain: Tensor | None,  # the log-sum-exp of the negatives where it is known
    mean_exponential: Tensor,
    hardness: float,
    prior: float,
    floor: Tensor,
    *,
    fused: bool,
) -> Tensor:
    """The logarithm of the mass of every row's negatives, −inf without one.

    ``|N| e^m``, m the log-mean-exp of the negatives' logits S weighted by ``e^{hardness · S}``; with a prior,
    the positives that are expected among the negatives are taken out again.
    """
    if plain is None and not hardness:
        plain = logsumexp(pairs, "other", fused=fused)
    if not (hardness or prior):
        assert plain is not None
        return plain
    negatives = allowed_count(pairs) - matching_count(pairs)
    size = negatives.clamp(min=1).to(pairs.queries.dtype).log()
    weighted, weights = plain, size
    if hardness:
        weighted = logsumexp(pairs, "other", factor=1 + hardness, fused=fused)
        weights = logsumexp(pairs, "other", factor=hardness, fused=fused)
    assert weighted is not None
    none = negatives == 0
    mean = weighted.masked_fill(none, 0) - weights.masked_fill(none, 0)
    if prior:
        taken = math.log(prior) + mean_exponential
        mean = torch.maximum(_log_difference(mean, taken) - math.log1p(-prior), floor)
    return (size + mean).masked_fill(none, -torch.inf)


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """``log(e^a − e^b)``, and lower than any clamp, with gradient zero, where that is not above 0."""
    above = a > b
    gap = torch.where(above, b - a, -1.0)
    return torch.where(above, a + torch.log1p(-gap.exp()), torch.finfo(a.dtype).min / 4)
