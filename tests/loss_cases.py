"""Every loss as one function of queries, keys, their ids and a temperature, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.functional import (
    clip_loss,
    clustered_infonce,
    hierarchical_infonce,
    siglip_loss,
    soft_infonce,
)

FUSED = ["fused"] if _ops.serves(torch.device("cpu")) else []
IMPLS = ["chunked", "reference", *FUSED]


def tags(ids: Tensor) -> Tensor:
    """A tag for a sample's cluster and one for half of all clusters; none for −1."""
    return torch.where(ids < 0, 0, (1 << ids.clamp(min=0) % 40) | (1 << (40 + ids.clamp(min=0) % 2)))


# Every loss as a function of queries, keys, their ids and a temperature, row by row. Without keys (None, and
# None for their ids) the one-sided ones are within the batch.
def clustered(**fixed: Any) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor | None, qc: Tensor, kc: Tensor | None, **options: Any) -> Tensor:
        return clustered_infonce(q, k, query_clusters=qc, key_clusters=kc, **fixed, **options)

    return loss


def hierarchical(q: Tensor, k: Tensor | None, qc: Tensor, kc: Tensor | None, **options: Any) -> Tensor:
    def levels(ids: Tensor) -> Tensor:
        return torch.stack([torch.where(ids < 0, -1, ids // 2), ids], 1)

    of_keys = None if kc is None else levels(kc)
    rows = hierarchical_infonce(q, k, query_clusters=levels(qc), key_clusters=of_keys, **options)
    return rows.sum(-1) if options.get("reduction") == "none" else rows


def soft(affinity: str) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor | None, qc: Tensor, kc: Tensor | None, **options: Any) -> Tensor:
        known = {"query_auxiliary": tags(qc)}
        if kc is not None:
            known |= {"key_auxiliary": tags(kc), "key_valid": kc != -1}
        return soft_infonce(q, k, affinity=affinity, **known, **options)

    return loss


def siglip(q: Tensor, k: Tensor, qc: Tensor, kc: Tensor, **options: Any) -> Tensor:
    return siglip_loss(q, k, x_clusters=qc, y_clusters=kc, bias=-2.0, **options)


def clip(q: Tensor, k: Tensor, qc: Tensor, kc: Tensor, **options: Any) -> Tensor:
    return clip_loss(q, k, x_clusters=qc, y_clusters=kc, **options)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "out": clustered(),
    "in": clustered(positives="in"),
    "other": clustered(denominator="other"),
    "decoupled": clustered(denominator="decoupled"),
    "hard": clustered(denominator="other", hardness=0.5),
    "hierarchical": hierarchical,
    "jaccard": soft("jaccard"),
    "cosine": soft("cosine"),
    "clip": clip,
    "siglip": siglip,
}
ROWWISE = [name for name in LOSSES if name != "clip"]  # whose rows are those of the queries alone


def problem(n: int, m: int, d: int, seed: int, magnitude: float = 1.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k = (magnitude * torch.randn(rows, d, generator=g, dtype=torch.float64) / d**0.5 for rows in (n, m))
    return q, k, torch.randint(-1, 6, (n,), generator=g), torch.randint(-1, 6, (m,), generator=g)


def values(name: str, case: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    q, k = (x.to(dtype, copy=True).requires_grad_() for x in case[:2])
    loss = LOSSES[name](q, k, *case[2:], reduction="none", **options)
    upstream = torch.linspace(0.5, 1.5, len(loss), dtype=dtype)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), [q, k])]
