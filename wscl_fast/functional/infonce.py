"""Clustered InfoNCE: arguments are checked here, and an implementation is chosen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wscl_fast import _ops, chunked, reference
from wscl_fast.functional._checks import (
    check_choice,
    check_device,
    check_matrix,
    check_positive,
    check_vector,
    is_fake,
)

__all__ = ["Impl", "Positives", "Reduction", "clustered_infonce"]

Impl = Literal["auto", "fused", "chunked", "reference"]
Positives = Literal["out", "in"]
Reduction = Literal["mean", "sum", "none"]


def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Clustered InfoNCE: alike within a cluster, unlike across clusters, without an N × M matrix.

    In plain PyTorch, with ``P`` the boolean matrix of positive pairs (``"out"``, every key allowed)::

        S = queries @ keys.T / temperature
        loss = (S.logsumexp(1) - (S * P).sum(1) / P.sum(1))[P.any(1)].mean()

    Sample ids as clusters make it InfoNCE, labels make it SupCon. Keys of a query's own cluster stay in
    the denominator. A query without a positive, or whose cluster is ``ignore_index``, contributes nothing
    and gets gradient zero; a key whose cluster is ``ignore_index`` is no one's positive or negative.
    Queries and keys are used as they are: normalise them first for cosine similarities.

    Args:
        queries: ``[N, d]``, float32 or float64 (bfloat16 and float16 are computed in float32).
        keys: ``[M, d]``. Without keys the queries are contrasted with each other, each without itself.
        query_clusters: ``[N]``, int64 cluster ids, any values.
        key_clusters: ``[M]``, int64; by default ``query_clusters`` (then M = N).
        temperature: positive number, or a 0-dim tensor, which then receives its exact gradient.
        positives: ``"out"``, the mean of the positives' logits outside the logarithm (SupCon's L_out), or
            ``"in"``, the logarithm of their mean exponential (L_in).
        weights: ``[N]``, a weight for each query.
        ignore_index: the id that says "no cluster".
        exclude_self: whether query i never meets key i. By default true where ``keys`` is not given and
            false otherwise. A tensor ``[N]`` int64 names each query's own key, −1 for none.
        reduction: ``"mean"`` (weighted, over the queries that have a positive), ``"sum"`` or ``"none"``
            (``[N]``, weighted, zero where there is no positive).
        impl: ``"fused"`` (C++ kernels), ``"chunked"`` (plain PyTorch, memory linear in N + M),
            ``"reference"`` (the definition, N × M), or ``"auto"``, the best that works.

    Returns:
        0-dim tensor, or ``[N]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit together, or a value is out of range.
        RuntimeError: ``impl="fused"`` where the extension was not built or does not serve the device.

    Source: Tsai et al., ICLR 2022 (arXiv 2202.06670), eq. 4; Khosla et al., NeurIPS 2020 (arXiv 2004.11362),
    eq. 2 (``"out"``) and 3 (``"in"``).
    """
    check_choice("positives", positives, Positives)
    check_choice("reduction", reduction, Reduction)
    check_choice("impl", impl, Impl)
    check_matrix("queries", queries)
    check_vector("query_clusters", query_clusters, len(queries), queries, integer=True)
    if keys is None:
        if key_clusters is not None:
            raise ValueError("key_clusters: expected None where keys is None, got a tensor")
    else:
        check_matrix("keys", keys)
        if keys.shape[1] != queries.shape[1]:
            raise ValueError(
                f"keys: expected {queries.shape[1]} columns as in queries, got shape {tuple(keys.shape)}"
            )
        check_device("keys", keys, queries)
        if key_clusters is None:
            if len(keys) != len(queries):
                raise ValueError(
                    f"key_clusters: needed where there are not as many keys ({len(keys)})"
                    f" as queries ({len(queries)}), got None"
                )
            key_clusters = query_clusters
        check_vector("key_clusters", key_clusters, len(keys), queries, integer=True)
    if weights is not None:
        check_vector("weights", weights, len(queries), queries, integer=False)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    own, in_batch = _own_keys(exclude_self, queries, keys)

    dtype = (
        torch.float64
        if torch.float64 in (queries.dtype, keys.dtype if keys is not None else None)
        else torch.float32
    )
    with torch.autocast(queries.device.type, enabled=False):
        scale = _scale(temperature, queries, dtype)
        queries = queries.to(dtype)
        keys = None if keys is None else keys.to(dtype)
        inner = positives == "in"
        if impl == "auto":
            impl = "fused" if _ops.serves(queries.device) else "chunked"
        if impl == "fused":
            loss, count = _ops.clustered_infonce(
                queries,
                keys,
                query_clusters,
                key_clusters,
                own,
                scale,
                exclude_self=in_batch,
                inner=inner,
                ignore_index=ignore_index,
            )
        else:
            module = chunked if impl == "chunked" else reference
            if in_batch:
                own = torch.arange(len(queries), device=queries.device)
            loss, count = module.clustered_infonce(
                queries,
                queries if keys is None else keys,
                query_clusters,
                query_clusters if key_clusters is None else key_clusters,
                own,
                scale,
                inner=inner,
                ignore_index=ignore_index,
            )
        return _reduce(loss, count, weights, reduction)


def _own_keys(
    exclude_self: bool | Tensor | None, queries: Tensor, keys: Tensor | None
) -> tuple[Tensor | None, bool]:
    """The index of every query's own key; where the queries are the keys, whether to leave it out."""
    if exclude_self is None or isinstance(exclude_self, bool):
        if keys is None:
            return None, exclude_self is not False
        if not exclude_self:
            return None, False
        if len(keys) < len(queries):
            raise ValueError(
                f"exclude_self: expected a key for each of the {len(queries)} queries, got {len(keys)} keys"
            )
        return torch.arange(len(queries), device=queries.device), False
    if not isinstance(exclude_self, Tensor):
        raise TypeError(f"exclude_self: expected a bool or a tensor, got {type(exclude_self).__name__}")
    if keys is None:
        raise ValueError("exclude_self: expected a bool where keys is None, got a tensor")
    check_vector("exclude_self", exclude_self, len(queries), queries, integer=True)
    return exclude_self, False


def _scale(temperature: float | Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / temperature as a 0-dim tensor of the computation's dtype."""
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or not temperature.is_floating_point():
            raise TypeError(
                "temperature: expected a number or a 0-dim floating-point tensor,"
                f" got shape {tuple(temperature.shape)}, {temperature.dtype}"
            )
        check_device("temperature", temperature, queries)
        # Looking at the value would stall a GPU and break a graph that is being traced.
        if queries.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(temperature):
            check_positive(temperature.detach().item())
        return 1 / temperature.to(dtype)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature: expected a number or a 0-dim tensor, got {type(temperature).__name__}")
    check_positive(temperature)
    return torch.full((), 1 / temperature, dtype=dtype, device=queries.device)


def _reduce(loss: Tensor, count: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    if weights is not None:
        loss = loss * weights.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    anchors = (count > 0).to(loss.dtype)
    share = anchors.sum() if weights is None else (anchors * weights.to(loss.dtype)).sum()
    return total / torch.where(share == 0, torch.ones_like(share), share)
