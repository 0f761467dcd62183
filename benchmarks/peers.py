"""The losses that users would pick instead, each under the arguments of ours.

pytorch-metric-learning and lightly are looked for when they are asked for; ``make bench`` has them in an
environment of its own (benchmarks/requirements-peers.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEMPERATURE = 0.1


def naive(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
) -> Tensor:
    """The loss as people write it: logits, a mask, two reductions."""
    in_batch = keys is None
    logits = queries @ (queries if keys is None else keys).T / TEMPERATURE
    mask = query_clusters[:, None] == (query_clusters if key_clusters is None else key_clusters)
    if in_batch:
        itself = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
        mask, logits = mask & ~itself, logits.masked_fill(itself, -1e9)
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    mask = mask.to(logits.dtype)
    rows = (mask * log_probability).sum(1) / mask.sum(1).clamp(min=1)
    return -rows.sum() / (mask.sum(1) > 0).sum().clamp(min=1)


def compiled_naive() -> Callable[..., Tensor]:
    """The same through torch.compile, for fixed shapes.

    It is one graph or an error: after eight shapes since ``torch.compiler.reset()`` it would run as it was
    written, without a word.
    """
    return torch.compile(naive, dynamic=False, fullgraph=True)


def metric_learning(name: str, **settings: Any) -> Callable[..., Tensor]:
    """A loss of pytorch-metric-learning on vectors that have length 1 already, its fastest setting."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    distances = importlib.import_module("pytorch_metric_learning.distances")
    similarity = distances.DotProductSimilarity(normalize_embeddings=False)
    loss_fn = getattr(losses, name)(temperature=TEMPERATURE, distance=similarity, **settings)

    def loss(
        queries: Tensor,
        keys: Tensor | None = None,
        *,
        query_clusters: Tensor,
        key_clusters: Tensor | None = None,
    ) -> Tensor:
        return loss_fn(queries, query_clusters, ref_emb=keys, ref_labels=key_clusters)  # type: ignore[no-any-return]

    return loss


def lightly_ntxent(temperature: float = TEMPERATURE, **settings: Any) -> Any:
    """Lightly's NTXentLoss, without torchvision, which its package imports and this loss does not need."""
    found = importlib.util.find_spec("lightly")
    if found is None or found.origin is None:
        raise ImportError("lightly is not installed")
    before = dict(sys.modules)
    try:
        # Packages whose __init__ is not run, so that only this loss's own modules are loaded.
        for package in (
            "lightly",
            "lightly.loss",
            "lightly.models",
            "lightly.models.modules",
            "lightly.utils",
        ):
            module = types.ModuleType(package)
            module.__path__ = [str(Path(found.origin).parent.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = module
        if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
            sys.modules["torchvision"] = types.ModuleType("torchvision")
            operators = types.ModuleType("torchvision.ops")
            operators.StochasticDepth = object  # type: ignore[attr-defined]  # imported there, not used here
            sys.modules["torchvision.ops"] = operators
        loss = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss
    finally:
        for imported in set(sys.modules) - set(before):
            if imported.split(".")[0] in ("lightly", "torchvision"):
                del sys.modules[imported]
    return loss(temperature=temperature, **settings)
