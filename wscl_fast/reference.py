"""The definition in plain PyTorch: oracle of the tests, last fallback, baseline of the benchmarks.

Every function here materialises the whole matrix and says what is computed in the fewest words;
:mod:`wscl_fast.chunked` and the fused kernels are held to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clustered_infonce(
    queries: Tensor,  # [N, d]
    keys: Tensor,  # [M, d]
    query_clusters: Tensor,  # [N] int64
    key_clusters: Tensor,  # [M] int64
    own: Tensor | None,  # [N] int64: index of the query's own key, −1 where it has none
    scale: Tensor,  # 0-dim, 1 / temperature
    *,
    inner: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Clustered InfoNCE of every row by its definition, in N × M memory.

    ``S = scale * q @ k.T``; ``loss = logsumexp(S over allowed) − mean(S over positives)`` for
    ``inner=False`` and ``− logmeanexp(S over positives)`` for ``inner=True``.

    Returns:
        The loss of every row ``[N]``, zero without a positive, and the count of its positives ``[N]``, int64.
    """
    allowed = (key_clusters != ignore_index).expand(len(queries), -1)
    if own is not None:
        allowed = allowed & (torch.arange(len(keys), device=keys.device) != own[:, None])
    positive = allowed & (query_clusters[:, None] == key_clusters)
    count = positive.sum(1)
    # Rows without a positive keep their logits unmasked: finite, so that the zero gradient stays zero.
    valid = (count > 0)[:, None]
    logits = scale.to(queries.dtype) * (queries @ keys.T)
    denominator = logits.masked_fill(valid & ~allowed, -torch.inf).logsumexp(1)
    share = 1 / count.clamp(min=1).to(logits.dtype)
    if inner:
        numerator = logits.masked_fill(valid & ~positive, -torch.inf).logsumexp(1) + share.log()
    else:
        numerator = logits.masked_fill(~positive, 0).sum(1) * share
    loss = denominator - numerator
    return loss.masked_fill(~valid[:, 0], 0), count


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
    x = torch.nn.functional.normalize(x, p=torch.inf, eps=torch.finfo(x.dtype).tiny)
    return torch.nn.functional.normalize(x, eps=torch.finfo(x.dtype).tiny)
