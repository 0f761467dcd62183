"""The definition in plain PyTorch: oracle of the tests, last fallback, baseline of the benchmarks.

Every function here materialises the N × M logits and says what is computed in the fewest words;
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
