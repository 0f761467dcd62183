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

from wscl_fast.functional._passes import Passes
from wscl_fast.functional._requests import (
    Count,
    LogitSum,
    LogSumExp,
    Request,
    SigmoidLogSumExp,
    Similarities,
    Softmax,
    SoftplusSum,
)
from wscl_fast.functional._variant import Variant
from wscl_fast.functional.statistics import RowStats, row_stats
from wscl_fast.pairs import Pairs


def composed_infonce(
    positive: Pairs,
    negative: Pairs,
    variant: Variant,
    passes: Passes,
    *,
    floor: Tensor,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor, RowStats | None]:
    """Loss and positives' count of every row, as ``reference.clustered_infonce`` defines them.

    With ``need_stats`` the rows' statistics as well. They cost no pass of their own but where there is
    hardness, which looks at the logits at other scales.
    """
    positive = passes.folded(positive)
    negative = negative._replace(queries=positive.queries, scale=positive.scale)
    got = passes(_requests(positive, negative, variant, need_stats))
    count = got["count"]
    log_count = count.clamp(min=1).to(positive.queries.dtype).log()
    # The positives' log-mean-exp, where it is needed.
    mean_exponential = -log_count
    if "pooled" in got:
        mean_exponential = got["pooled"].masked_fill(count == 0, 0) - log_count
    stats = None
    if need_stats:
        got["mass"], mean_logit = got["softmax"]
        scale = (-floor).detach()
        stats = row_stats(positive, scale, got["similarities"], got["mass"], mean_logit, variant.plain)
    mass = got["mass"] if variant.plain else _negative_mass(got, mean_exponential, variant, floor)
    if variant.denominator == "decoupled":  # without a negative there is nothing to be told apart from
        count = count.masked_fill(mass == -torch.inf, 0)
    mass = mass.masked_fill(mass == -torch.inf, torch.finfo(mass.dtype).min / 4)

    size = count.clamp(min=1).to(mass.dtype)
    if variant.denominator == "other" and variant.inner:
        loss = log_count - passes({"": SigmoidLogSumExp(positive, -mass)})[""]
    elif variant.denominator == "other":
        turned = positive._replace(scale=-positive.scale)
        loss = passes({"": SoftplusSum(turned, "same", mass)})[""] / size
    else:
        if variant.denominator == "all" and not variant.plain:
            pooled_mass = mean_exponential + log_count
            mass = pooled_mass - logsigmoid(pooled_mass - mass)
        loss = mass - (mean_exponential if variant.inner else got["logits"] / size)
    return torch.where(count > 0, loss, 0.0), count, stats


def _requests(positive: Pairs, negative: Pairs, variant: Variant, need_stats: bool) -> dict[str, Request]:
    """What the formula reads that does not depend on a first answer."""
    other, plain = variant.denominator == "other", variant.plain
    wanted: dict[str, Request] = {"count": Count(positive)}
    if (variant.inner and not other) or variant.prior or (variant.denominator == "all" and not plain):
        wanted["pooled"] = LogSumExp(positive, "same")
    if not variant.inner and not other:
        wanted["logits"] = LogitSum(positive)
    if need_stats:
        wanted["softmax"] = Softmax(negative, "all" if plain else "other")
        wanted["similarities"] = Similarities(positive, negative.query_ids, negative.key_ids)
    elif not variant.hardness:
        wanted["mass"] = LogSumExp(negative, "all" if plain else "other")
    if variant.hardness or variant.prior:
        wanted["met"], wanted["kind"] = Count(negative, "all"), Count(negative, "same")
    if variant.hardness:
        wanted["weighted"] = LogSumExp(negative, "other", 1 + variant.hardness)
        wanted["weights"] = LogSumExp(negative, "other", variant.hardness)
    return wanted


def _negative_mass(
    got: dict[str, Tensor], mean_exponential: Tensor, variant: Variant, floor: Tensor
) -> Tensor:
    """The logarithm of the mass of every row's negatives, −inf without one.

    ``|N| e^m``, m the log-mean-exp of the negatives' logits S weighted by ``e^{hardness · S}``; with a prior,
    the positives that are expected among the negatives are taken out again.
    """
    if not (variant.hardness or variant.prior):
        return got["mass"]
    negatives = got["met"] - got["kind"]
    size = negatives.clamp(min=1).to(mean_exponential.dtype).log()
    weighted, weights = (got["weighted"], got["weights"]) if variant.hardness else (got["mass"], size)
    none = negatives == 0
    mean = weighted.masked_fill(none, 0) - weights.masked_fill(none, 0)
    if variant.prior:
        taken = math.log(variant.prior) + mean_exponential
        mean = torch.maximum(_log_difference(mean, taken) - math.log1p(-variant.prior), floor)
    return (size + mean).masked_fill(none, -torch.inf)


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """``log(e^a − e^b)``, and lower than any clamp, with gradient zero, where that is not above 0.

    NaN where it is not known: that must not count as the clamp.
    """
    above = ~((a <= b) & (a < torch.inf))
    gap = torch.where(above, b - a, -1.0)
    return torch.where(above, a + torch.log1p(-gap.exp()), torch.finfo(a.dtype).min / 4)
