"""Pairs that the tests of the operators over them share, from a seed, and who meets whom among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MEETS = ("all", "same", "other")
SHAPES = [(1, 1, 1), (5, 3, 7), (127, 129, 33), (300, 700, 64), (4, 5000, 20), (6, 0, 5), (0, 6, 5)]


def case(
    n: int, m: int, d: int, *, dtype: torch.dtype = torch.float64, clusters: int = 4, seed: int = 0
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "queries": torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype),
        "keys": torch.randn(m, d, generator=g, dtype=torch.float64).to(dtype),
        "query_ids": torch.randint(-1, clusters, (n,), generator=g),
        "key_ids": torch.randint(-1, clusters + 2, (m,), generator=g),
        "own": torch.randint(-1, max(m, 1), (n,), generator=g),
        "scale": torch.tensor(0.7, dtype=dtype),
    }


def met(a: dict[str, Any], meets: str) -> Tensor:
    """``[N, M]``: who meets whom."""
    n, m = len(a["queries"]), len(a["keys"])
    query_ids = torch.zeros(n, dtype=torch.int64) if a["query_ids"] is None else a["query_ids"]
    key_ids = torch.zeros(m, dtype=torch.int64) if a["key_ids"] is None else a["key_ids"]
    mask = (query_ids != -1)[:, None] & (key_ids != -1)
    if meets != "all":
        mask &= (query_ids[:, None] == key_ids) == (meets == "same")
    return mask if a["own"] is None else mask & (torch.arange(m) != a["own"][:, None])


def with_gradients(a: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    leaves = {name: a[name].clone().requires_grad_() for name in ("queries", "keys", "scale")}
    return {**a, **leaves}, list(leaves.values())
