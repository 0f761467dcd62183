"""Clustered InfoNCE: arguments are checked here, and an implementation is chosen."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from wscl_fast import _ops, reference
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import check_bool, check_choice, check_vector
from wscl_fast.functional._denominators import composed_infonce
from wscl_fast.functional._inputs import Batch, Impl, Inputs, Reduction, no_autocast, prepare, reduce_rows
from wscl_fast.functional._passes import Passes
from wscl_fast.functional._requests import fused_infonce
from wscl_fast.functional._variant import Denominator, Positives, Variant
from wscl_fast.functional.statistics import InfoNCEStats, RowStats, summarise
from wscl_fast.pairs import Pairs

__all__ = ["Denominator", "Positives", "clustered_infonce"]

_LEAST = torch.finfo(torch.float32).tiny  # temperature that every dtype can divide by


@overload
def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    denominator: Denominator = "all",
    hardness: float = 0.0,
    prior: float = 0.0,
    query_samples: Tensor | None = None,
    key_samples: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    denominator: Denominator = "all",
    hardness: float = 0.0,
    prior: float = 0.0,
    query_samples: Tensor | None = None,
    key_samples: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    return_stats: Literal[True],
) -> tuple[Tensor, InfoNCEStats]: ...


@takes_arrays
def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    denominator: Denominator = "all",
    hardness: float = 0.0,
    prior: float = 0.0,
    query_samples: Tensor | None = None,
    key_samples: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """Clustered InfoNCE: alike within a cluster, unlike across clusters, without an N × M matrix.

    In plain PyTorch, with ``P`` the boolean matrix of positive pairs (``"out"``, every key allowed)::

        S = queries @ keys.T / temperature
        loss = (S.logsumexp(1) - (S * P).sum(1) / P.sum(1))[P.any(1)].mean()

    Sample ids as clusters make it InfoNCE, labels make it SupCon. A query without a positive, or whose
    cluster is ``ignore_index``, contributes nothing and gets gradient zero; a key whose cluster is
    ``ignore_index`` is no one's positive or negative. Queries and keys are used as they are: normalise them
    first for cosine similarities. ``docs/objective.md`` has the equations of every option.

    Args:
        queries: ``[N, d]``, float32, float64, bfloat16 or float16. Halves are added up in float32; where they
            are multiplied as halves (bfloat16 on many processors, both on a GPU), the softmax's weights that
            gradients sum by are rounded to them.
        keys: ``[M, d]``. Without keys the queries are contrasted with each other, each without itself.
        query_clusters: ``[N]``, int64 cluster ids, any values.
        key_clusters: ``[M]``, int64; by default ``query_clusters`` (then M = N).
        temperature: positive number; or a 0-dim tensor, or one of shape ``[N]`` with a temperature for each
            query, which then receive their exact gradient.
        positives: ``"out"``, the mean of the positives' logits outside the logarithm (SupCon's L_out), or
            ``"in"``, the logarithm of their mean exponential (L_in).
        denominator: what a positive is told apart from. ``"all"``: every key, those of the query's own
            cluster among them. ``"other"``: itself and the keys of other clusters, as NT-Xent has it for
            several positives. ``"decoupled"``: the keys of other clusters alone; a query without such a key
            then takes no part.
        hardness: β ≥ 0; weighs a negative by ``exp(β S)`` (hard-negative sampling). 0 weighs all alike.
        prior: τ⁺ in [0, 1), the share of a query's own kind that is expected among its negatives, taken out
            of them again (debiased contrastive loss). It supposes vectors of length one.
        query_samples: ``[N]``, int64 sample ids. Where given, only keys of the query's own sample are its
            positives (its other views); clusters then say which keys are no negatives under
            ``denominator="other"`` and ``"decoupled"``.
        key_samples: ``[M]``, int64; by default ``query_samples``.
        weights: ``[N]``, a weight for each query.
        ignore_index: the id that says "no cluster".
        exclude_self: whether query i never meets key i. By default true where ``keys`` is not given and
            false otherwise. A tensor ``[N]`` int64 names each query's own key, −1 for none.
        reduction: ``"mean"`` (weighted, over the queries that have a positive), ``"sum"`` or ``"none"``
            (``[N]``, weighted, zero where there is no positive).
        impl: ``"fused"`` (C++ kernels), ``"chunked"`` (plain PyTorch, memory linear in N + M),
            ``"reference"`` (the definition, N × M), or ``"auto"``, the best that works. The first has no
            second derivative, the others have.
        return_stats: return ``(loss, stats)``, with each query's log-sum-exp and number of positives, and
            what tells of the batch as a whole: :class:`InfoNCEStats`.

    Returns:
        0-dim tensor, or ``[N]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, or a value is out of range.
        RuntimeError: ``impl="fused"`` where the extension was not built or does not serve the device.

    Source: Tsai et al., ICLR 2022 (arXiv 2202.06670), eq. 4; Khosla et al., NeurIPS 2020 (arXiv 2004.11362),
    eq. 2 (``"out"``) and 3 (``"in"``); Yeh et al., ECCV 2022 (arXiv 2110.06848; ``"decoupled"``); Robinson
    et al., ICLR 2021 (arXiv 2010.04592; ``hardness``); Chuang et al., NeurIPS 2020 (arXiv 2007.00224;
    ``prior``).
    """
    plain = query_samples is key_samples is weights is exclude_self is None and return_stats is False
    if plain and type(hardness) is type(prior) is float and hardness == prior == 0 and denominator == "all":
        made = _at_once(
            queries, keys, query_clusters, key_clusters, temperature, positives, ignore_index, reduction, impl
        )
        if made is not None:
            return made
    check_choice("reduction", reduction, Reduction)
    check_bool("return_stats", return_stats)
    rows = infonce_rows(
        Batch(queries, keys, query_clusters, key_clusters, temperature, ignore_index, exclude_self),
        Variant(positives, denominator, hardness, prior),
        query_samples,
        key_samples,
        impl=impl,
        need_stats=return_stats,
        reduction=reduction if weights is None else "none",
    )
    loss = rows.loss if rows.reduced else reduce_rows(rows.loss, rows.positives, weights, reduction)
    return loss if rows.stats is None else (loss, summarise(rows.stats, rows.positives, rows.scale))


def _at_once(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    temperature: float | Tensor,
    positives: Positives,
    ignore_index: int,
    reduction: Reduction,
    impl: Impl,
) -> Tensor | None:
    """The loss by the operator that makes all of it, where everything is as it takes it; else None.

    The checks below, and the steps that follow on them, take longer than the loss of a small batch. The
    operator has its own; what it refuses goes the long way, which says why, or makes it fit.
    """
    if not _ops.is_eager() or type(queries) is not Tensor:
        return None
    if keys is not None and key_clusters is None:
        key_clusters = query_clusters
    device = queries.device
    others = (query_clusters,) if keys is None else (query_clusters, keys, key_clusters)
    if (
        not all(type(tensor) is Tensor and tensor.device == device for tensor in others)
        or not (queries.is_cpu or (queries.is_cuda and _ops.serves_device(device.index)))
        or (keys is None and key_clusters is not None)
        or type(temperature) is not float
        or not _LEAST < temperature < inf
        or positives not in ("out", "in")
        or type(ignore_index) is not int
        or reduction not in ("mean", "sum")
        or impl not in ("auto", "fused")
    ):
        return None
    try:
        made = _ops.reduced_infonce(
            queries, keys, query_clusters, key_clusters, None, None, 1 / temperature, keys is None,
            positives == "in", ignore_index, reduction == "mean",
        )  # fmt: skip
    except RuntimeError:
        return None
    return None if made is None else made[0]


class Rows(NamedTuple):
    """The loss before it is reduced."""

    loss: Tensor  # [N], 0 where a row takes no part; or 0-dim, reduced
    positives: Tensor  # [N] int64, 0 where a row takes no part
    stats: RowStats | None
    scale: Tensor  # 1 / temperature, 0-dim or [N]

    @property
    def reduced(self) -> bool:
        """Whether a kernel has made the mean or the sum that was asked for."""
        return not self.loss.ndim


def infonce_rows(
    batch: Batch,
    variant: Variant,
    query_samples: Tensor | None = None,
    key_samples: Tensor | None = None,
    *,
    impl: Impl = "auto",
    need_stats: bool = False,
    reduction: Reduction = "none",
    passes: Callable[[bool], Passes] = Passes,
) -> Rows:
    """:func:`clustered_infonce` of every row, not weighted.

    ``reduction`` says that their mean or sum will do, which a kernel may give instead.
    """
    as_one = variant.plain and not need_stats  # there is a kernel for the whole loss
    inputs, impl, answers = prepare(batch, impl, passes, halves=as_one)
    as_one = as_one and inputs.pairs.queries.dtype == inputs.pairs.keys.dtype
    positive = _check_samples(inputs, query_samples, key_samples)
    negative = positive if variant.denominator == "all" else inputs.pairs
    with no_autocast(positive.queries):
        if impl == "reference":
            loss, count = reference.clustered_infonce(
                positive,
                negative,
                inner=variant.inner,
                denominator=variant.denominator,
                hardness=variant.hardness,
                prior=variant.prior,
                floor=inputs.lowest,
            )
            stats = None
            if need_stats:
                with torch.no_grad():
                    parts = reference.row_stats(positive, negative, inputs.scale, everyone=variant.plain)
                    stats = RowStats(*parts)
        elif as_one and answers.fused and answers.whole:
            # Where queries are keys in every respect there is a kernel that uses it.
            in_batch = inputs.in_batch and query_samples is None
            loss, count = fused_infonce(positive, variant.inner, in_batch=in_batch, reduction=reduction)
            stats = None
        else:
            loss, count, stats = composed_infonce(
                positive, negative, variant, answers, floor=inputs.lowest, need_stats=need_stats
            )
    return Rows(loss, count, stats, inputs.scale)


def _check_samples(inputs: Inputs, query_samples: Tensor | None, key_samples: Tensor | None) -> Pairs:
    """The pairs whose ids say who is positive: sample ids where they are given, else clusters."""
    pairs = inputs.pairs
    if query_samples is None:
        if key_samples is not None:
            raise ValueError("key_samples: expected None where query_samples is None, got a tensor")
        return pairs
    check_vector("query_samples", query_samples, len(pairs.queries), pairs.queries, integer=True)
    if key_samples is None:
        if len(pairs.keys) != len(pairs.queries):
            raise ValueError(
                f"key_samples: needed where there are not as many keys ({len(pairs.keys)})"
                f" as queries ({len(pairs.queries)}), got None"
            )
        key_samples = query_samples
    check_vector("key_samples", key_samples, len(pairs.keys), pairs.queries, integer=True)
    if inputs.in_batch and key_samples is not query_samples:
        raise ValueError("key_samples: expected None where keys is None, got a tensor")
    ignored, limits = pairs.ignore_index, torch.iinfo(torch.int64)
    nobody = limits.min if ignored != limits.min else limits.max
    # A key with a cluster but no sample stays in the denominator, and is no one's positive.
    query_ids = torch.where(pairs.query_ids == ignored, ignored, query_samples)
    key_ids = torch.where(key_samples == ignored, nobody, key_samples)
    return inputs.with_ids(query_ids, torch.where(pairs.key_ids == ignored, ignored, key_ids))
