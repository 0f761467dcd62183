"""InfoNCE with soft positives: pairs weighed by what two samples have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wscl_fast import affinity as affinities
from wscl_fast import chunked, reference
from wscl_fast.affinity import Affinity
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import (
    check_choice,
    check_device,
    check_matrix,
    check_vector,
    refuse_vmap,
)
from wscl_fast.functional._inputs import Impl, Reduction, check_inputs, choose, reduce_rows
from wscl_fast.functional._passes import logsumexp, weighted_sum
from wscl_fast.functional.infonce import Positives
from wscl_fast.pairs import Pairs

__all__ = ["conditional_factors", "soft_infonce"]

# A row takes part if the sum of its weights, less its own key's, is more than rounding may have left.
LEAST = 1e-9


@takes_arrays
def soft_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_auxiliary: Tensor,
    key_auxiliary: Tensor | None = None,
    affinity: Affinity,
    key_valid: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    weights: Tensor | None = None,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """InfoNCE whose positives are all keys, each by its affinity with the query.

    In plain PyTorch, with ``W [N, M]`` the affinities (``"out"``, every key allowed)::

        S = queries @ keys.T / temperature
        loss = (S.logsumexp(1) - (W * S).sum(1) / W.sum(1))[W.sum(1) > 0].mean()

    W never exists. What the samples are known by, their auxiliary information, is

    - sets of tags, as bit masks ``[N]`` or ``[N, words]`` int64 (tag t is bit t mod 64 of word t // 64):
      ``affinity="shared"`` is 1 where two sets have a tag in common, ``"count"`` the number of common tags,
      ``"jaccard"`` their share of all tags of both, ``"cosine"`` ``|a ∩ b| / √(|a| |b|)``;
    - or vectors ``[N, r]`` with ``affinity="kernel"``: the product ⟨u, v⟩, a kernel's in as far as the
      vectors are its features (random Fourier features for a Gaussian, :func:`conditional_factors`).

    ``"count"``, ``"cosine"`` and ``"kernel"`` cost O((N + M) r d) beside the log-sum-exp, with r = 64 for
    each word of tags; ``"shared"`` and ``"jaccard"`` a pass over tiles that counts common bits.
    ``positives="in"`` is one in plain PyTorch for all of them.

    Args:
        queries: ``[N, d]``, as in :func:`wscl_fast.functional.clustered_infonce`.
        keys: ``[M, d]``. Without keys the queries are contrasted with each other, each without itself.
        query_auxiliary: tag masks or vectors of the queries. No gradient comes back to vectors.
        key_auxiliary: of the keys; by default ``query_auxiliary``.
        affinity: what weighs a pair.
        key_valid: ``[M]`` bool, False for a key that is no one's negative or positive (an empty slot of a
            queue). A key without tags is everyone's negative.
        temperature: positive number, or a tensor, 0-dim or ``[N]``.
        positives: ``"out"``: the weighted mean of the logits; ``"in"``: the logarithm of the weighted mean
            of their exponentials, where the weights of a kernel may be below 0.
        weights: ``[N]``, a weight for each query.
        exclude_self: as in ``clustered_infonce``.
        reduction: ``"mean"`` is over the queries whose affinities have a sum above 0 (``"in"``: and their
            exponentials too); the others contribute nothing and get gradient zero.
        impl: as in ``clustered_infonce``.

    Returns:
        0-dim tensor, or ``[N]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as ``clustered_infonce``.

    Source: Dufumier et al., MICCAI 2021 (arXiv 2106.08808; a kernel's weights outside the logarithm); Tsai et
    al., *Conditional Contrastive Learning with Kernels*, ICLR 2022 (arXiv 2202.05458; inside of it).
    """
    check_choice("positives", positives, Positives)
    check_choice("affinity", affinity, Affinity)
    check_choice("reduction", reduction, Reduction)
    check_choice("impl", impl, Impl)
    query_auxiliary = _check_auxiliary("query_auxiliary", query_auxiliary, affinity)
    of_keys = query_auxiliary
    if key_auxiliary is not None:
        of_keys = _check_auxiliary("key_auxiliary", key_auxiliary, affinity)
    check_matrix("queries", queries)
    if keys is not None:
        check_matrix("keys", keys)
    for name, value, rows in (
        ("query_auxiliary", query_auxiliary, queries),
        ("key_auxiliary", of_keys, queries if keys is None else keys),
    ):
        check_device(name, value, queries)
        if value.shape != (len(rows), query_auxiliary.shape[1]):
            raise ValueError(
                f"{name}: expected shape {(len(rows), query_auxiliary.shape[1])}, got {tuple(value.shape)}"
            )
    inputs = check_inputs(
        queries,
        keys,
        torch.zeros(len(queries), dtype=torch.int64, device=queries.device),
        None if keys is None else _valid_ids(key_valid, of_keys),
        temperature,
        -1,
        exclude_self,
    )
    pairs = inputs.pairs
    if keys is None and key_valid is not None:
        pairs = pairs._replace(key_ids=_valid_ids(key_valid, of_keys))
    if weights is not None:
        check_vector("weights", weights, len(queries), queries, integer=False)
    impl, inner = choose(impl, pairs.queries), positives == "in"
    with torch.autocast(queries.device.type, enabled=False):
        if impl == "reference":
            matrix = affinities.weights(affinity, query_auxiliary, of_keys, pairs.queries.dtype)
            loss, valid = reference.soft_infonce(pairs, matrix, inner=inner)
        else:
            loss, valid = _rows(
                pairs,
                affinity,
                query_auxiliary,
                of_keys,
                some_missing=key_valid is not None,
                inner=inner,
                fused=impl == "fused",
            )
        return reduce_rows(loss, valid, weights, reduction)


def _rows(
    pairs: Pairs,
    affinity: Affinity,
    of_queries: Tensor,
    of_keys: Tensor,
    *,
    some_missing: bool,
    inner: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of every row, and which rows take part."""
    pairs = pairs.folded()
    lse = logsumexp(pairs, "all", fused=fused)
    keys = pairs.keys
    if some_missing:  # a key that is not there has no tags, or no features
        there = (pairs.key_ids != pairs.ignore_index)[:, None]
        of_keys = torch.where(there, of_keys, torch.zeros_like(of_keys))
        keys = torch.where(there, keys, 0.0)
    pulled, total = weighted_sum(affinity, of_queries, of_keys, keys, fused=fused)
    least = torch.zeros_like(total)
    if pairs.own is not None and len(keys):
        own = pairs.own.clamp(min=0, max=len(keys) - 1)
        weight = affinities.own_weights(affinity, of_queries, of_keys[own], torch.float64)
        weight = torch.where((pairs.own >= 0) & (pairs.own < len(keys)), weight, 0.0)
        pulled = pulled - weight[:, None].to(keys.dtype) * keys.index_select(0, own)
        total, least = total - weight, LEAST * weight.abs()
    valid = total > least
    share = torch.where(valid, total, 1.0)
    if inner:
        mass = chunked.weighted_logsumexp(affinity, of_queries, of_keys, pairs)
        valid = valid & (mass > -torch.inf)
        numerator = mass.masked_fill(~valid, 0) - share.log().to(mass.dtype)
    else:
        numerator = (pairs.queries * (pulled / share[:, None].to(pulled.dtype))).sum(1)
    return torch.where(valid, lse.masked_fill(~valid, 0) - numerator.masked_fill(~valid, 0), 0.0), valid


@takes_arrays
def conditional_factors(vectors: Tensor, ridge: float = 0.1) -> Tensor:
    """Vectors whose products are the conditional weights of CCL-K for a kernel with features ``vectors``.

    In plain PyTorch: with ``K = vectors @ vectors.T``, the result ``u`` has
    ``u @ u.T = torch.linalg.inv(K + ridge * eye(N)) @ K``, at the cost of O(N r²) instead of O(N³): as
    ``soft_infonce(x, query_auxiliary=u, affinity="kernel", positives="in")`` they estimate the expectation
    of e^S over samples whose auxiliary information is the query's.

    Args:
        vectors: ``[N, r]`` floating point, features of the samples' auxiliary information.
        ridge: λ above 0, how much noise is assumed in it.

    Returns:
        ``[N, r]``, in the dtype of ``vectors``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Tsai et al., *Conditional Contrastive Learning with Kernels*, ICLR 2022 (arXiv 2202.05458), whose
    K_{XY} (K_Z + λI)⁻¹ K_Z this factors.
    """
    vectors = _check_auxiliary("vectors", vectors, "kernel")
    if isinstance(ridge, bool) or not isinstance(ridge, int | float):
        raise TypeError(f"ridge: expected a number, got {type(ridge).__name__}")
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge: expected a finite number above 0, got {ridge}")
    # (U Uᵀ + λ)⁻¹ U Uᵀ = U (Uᵀ U + λ)⁻¹ Uᵀ
    wide = vectors.double()
    inner = wide.T @ wide
    lower = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), dtype=wide.dtype, device=wide.device))
    factors: Tensor = torch.linalg.solve_triangular(lower, wide.T, upper=False).T
    return factors.to(vectors.dtype)


def _check_auxiliary(name: str, value: object, affinity: Affinity) -> Tensor:
    """Tag masks as ``[rows, words]``, or vectors as they are, without their graph."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    refuse_vmap(name, value)
    if affinity == "kernel":
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype for a kernel, got {value.dtype}")
        if value.ndim != 2:
            raise ValueError(f"{name}: expected a matrix [rows, r], got shape {tuple(value.shape)}")
        return value.detach()
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 bit masks for {affinity!r}, got {value.dtype}")
    if value.ndim not in (1, 2) or (value.ndim == 2 and value.shape[1] == 0):
        raise ValueError(f"{name}: expected shape [rows] or [rows, words], got {tuple(value.shape)}")
    return value[:, None] if value.ndim == 1 else value


def _valid_ids(valid: Tensor | None, of_keys: Tensor) -> Tensor:
    """The id 0 for every key that counts, else −1."""
    ids = torch.zeros(len(of_keys), dtype=torch.int64, device=of_keys.device)
    if valid is None:
        return ids
    if not isinstance(valid, Tensor):
        raise TypeError(f"key_valid: expected a tensor, got {type(valid).__name__}")
    if valid.dtype != torch.bool:
        raise TypeError(f"key_valid: expected bool, got {valid.dtype}")
    if valid.shape != ids.shape:
        raise ValueError(f"key_valid: expected shape {tuple(ids.shape)}, got {tuple(valid.shape)}")
    return torch.where(valid, ids, -1)
