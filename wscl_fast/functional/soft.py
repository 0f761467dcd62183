"""InfoNCE with soft positives: pairs weighed by what two samples have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wscl_fast import affinity as affinities
from wscl_fast import reference
from wscl_fast.affinity import Affinity
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import (
    check_choice,
    check_device,
    check_matrix,
    check_positive,
    check_tensor,
)
from wscl_fast.functional._inputs import Batch, Impl, Reduction, no_autocast, prepare, reduce_rows
from wscl_fast.functional._passes import Passes
from wscl_fast.functional._requests import (
    AffinityLogSumExp,
    AffinitySum,
    InBatchLogSumExp,
    LogSumExp,
    Request,
)
from wscl_fast.functional._variant import Positives
from wscl_fast.functional.kmeans import check_finite
from wscl_fast.pairs import Pairs
from wscl_fast.values import is_fake

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
    check_choice("reduction", reduction, Reduction)
    known = Auxiliary(affinity, query_auxiliary, key_auxiliary, key_valid)
    loss, valid = soft_rows(queries, keys, known, temperature, exclude_self, positives, impl=impl)
    return reduce_rows(loss, valid, weights, reduction)


@dataclass(frozen=True)
class Auxiliary:
    """What the samples are known by, as it was given."""

    affinity: Affinity
    of_queries: Tensor
    of_keys: Tensor | None
    key_valid: Tensor | None

    def checked(self, queries: Tensor, keys: Tensor | None) -> Auxiliary:
        """With the keys' own and masks as matrices; what does not fit to queries and keys is refused."""
        check_choice("affinity", self.affinity, Affinity)
        check_matrix("queries", queries)
        if keys is not None:
            check_matrix("keys", keys)
        rows = {"query_auxiliary": queries, "key_auxiliary": queries if keys is None else keys}
        of_queries = of_keys = check_auxiliary("query_auxiliary", self.of_queries, self.affinity)
        if self.of_keys is not None:
            of_keys = check_auxiliary("key_auxiliary", self.of_keys, self.affinity)
        for (name, vectors), value in zip(rows.items(), (of_queries, of_keys), strict=True):
            check_device(name, value, queries)
            shape = (len(vectors), of_queries.shape[1])
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if self.key_valid is not None:
            _check_valid(self.key_valid, len(of_keys), queries)
        return Auxiliary(self.affinity, of_queries, of_keys, self.key_valid)


def soft_rows(
    queries: Tensor,
    keys: Tensor | None,
    known: Auxiliary,
    temperature: float | Tensor,
    exclude_self: bool | Tensor | None,
    positives: Positives,
    *,
    impl: Impl = "auto",
    passes: Callable[[bool], Passes] = Passes,
) -> tuple[Tensor, Tensor]:
    """The loss of every row, neither weighted nor reduced, and which rows take part."""
    check_choice("positives", positives, Positives)
    known = known.checked(queries, keys)
    assert known.of_keys is not None
    ids, key_ids = (
        torch.zeros(len(side), dtype=torch.int64, device=queries.device) for side in (queries, known.of_keys)
    )
    if known.key_valid is not None:
        key_ids = torch.where(known.key_valid, key_ids, -1)
    batch = Batch(queries, keys, ids, None if keys is None else key_ids, temperature, -1, exclude_self)
    inputs, impl, answers = prepare(batch, impl, passes)
    pairs, inner = inputs.pairs._replace(key_ids=key_ids), positives == "in"
    with no_autocast(queries):
        if impl == "reference":
            matrix = affinities.weights(known.affinity, known.of_queries, known.of_keys, pairs.queries.dtype)
            return reference.soft_infonce(pairs, matrix, inner=inner)
        folded = answers.folded(pairs)
        halved = inputs.in_batch and known.key_valid is None
        lse = InBatchLogSumExp(pairs) if halved else LogSumExp(folded)
        return _rows(lse, folded, known, inner, answers)


def _rows(
    everyone: LogSumExp, pairs: Pairs, known: Auxiliary, inner: bool, passes: Passes
) -> tuple[Tensor, Tensor]:
    assert known.of_keys is not None
    weights = known.affinity, known.of_queries, known.of_keys
    wanted: dict[str, Request] = {
        "lse": everyone,
        "sums": AffinitySum(pairs, *weights, some_missing=known.key_valid is not None),
    }
    if inner:
        wanted["masses"] = AffinityLogSumExp(pairs, *weights)
    got = passes(wanted)
    logits, total, taken = got["sums"]
    unknown = total.isnan()  # where a vector is NaN, a loss is owed that says so
    valid = (total > LEAST * taken.abs()) | unknown
    share = torch.where(valid, total, 1.0)
    if inner:
        mass = reference.log_difference(*got["masses"])
        valid = valid & ((mass != -torch.inf) | unknown)
        numerator = mass.masked_fill(~valid, 0) - share.log().to(mass.dtype)
    else:
        numerator = (logits / share).to(got["lse"].dtype).masked_fill(~valid, 0)
    loss = got["lse"].masked_fill(~valid, 0) - numerator
    return torch.where(valid, reference.spoilt(loss, unknown), 0.0), valid


@takes_arrays
def conditional_factors(vectors: Tensor, ridge: float = 0.1) -> Tensor:
    """Vectors whose products are the conditional weights of CCL-K for a kernel with features ``vectors``.

    In plain PyTorch: with ``K = vectors @ vectors.T``, the result ``u`` has
    ``u @ u.T = torch.linalg.inv(K + ridge * eye(N)) @ K``, at the cost of O(N r²) instead of O(N³): as
    ``soft_infonce(x, query_auxiliary=u, affinity="kernel", positives="in")`` they estimate the expectation
    of e^S over samples whose auxiliary information is the query's.

    Args:
        vectors: ``[N, r]`` floating point, features of the samples' auxiliary information.
        ridge: λ above 0, how much noise is assumed in it; not so little that float64 loses it beside
            ``vectors.T @ vectors``.

    Returns:
        ``[N, r]``, in the dtype of ``vectors``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; vectors that are not
            finite, and a ridge that is lost.

    Source: Tsai et al., *Conditional Contrastive Learning with Kernels*, ICLR 2022 (arXiv 2202.05458), whose
    K_{XY} (K_Z + λI)⁻¹ K_Z this factors.
    """
    vectors = check_auxiliary("vectors", vectors, "kernel")
    ridge = check_positive("ridge", ridge)
    check_finite("vectors", vectors)
    # (U Uᵀ + λ)⁻¹ U Uᵀ = U (Uᵀ U + λ)⁻¹ Uᵀ
    wide = vectors.double()
    inner = wide.T @ wide
    ridged = inner + ridge * torch.eye(len(inner), dtype=wide.dtype, device=wide.device)
    traced = torch.compiler.is_compiling()
    lower, failed = torch.linalg.cholesky_ex(ridged, check_errors=traced)  # a graph has PyTorch's own error
    if not (traced or is_fake(failed)) and int(failed):
        largest = float(inner.diagonal().max())
        raise ValueError(
            f"ridge: expected a number that float64 keeps beside {largest:.3g}, the largest sum of squares of"
            f" a column of vectors, got {ridge}"
        )
    factors: Tensor = torch.linalg.solve_triangular(lower, wide.T, upper=False).T
    return factors.to(vectors.dtype)


def check_auxiliary(name: str, value: object, affinity: Affinity) -> Tensor:
    """Tag masks as ``[rows, words]``, or vectors as they are, without their graph."""
    value = check_tensor(name, value)
    if affinity == "kernel":
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype for a kernel, got {value.dtype}")
        check_matrix(name, value)
        return value.detach()
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 bit masks for {affinity!r}, got {value.dtype}")
    if value.ndim not in (1, 2) or (value.ndim == 2 and value.shape[1] == 0):
        raise ValueError(f"{name}: expected shape [rows] or [rows, words], got {tuple(value.shape)}")
    return value[:, None] if value.ndim == 1 else value


def _check_valid(valid: object, keys: int, queries: Tensor) -> None:
    valid = check_tensor("key_valid", valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"key_valid: expected bool, got {valid.dtype}")
    if valid.shape != (keys,):
        raise ValueError(f"key_valid: expected shape {(keys,)}, got {tuple(valid.shape)}")
    check_device("key_valid", valid, queries)
