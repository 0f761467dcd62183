"""Our loss in place of others' gives their values and gradients, on the kinds of batches their tests have.

Needs the extra ``peers``; ``make bench`` has it in an environment of its own, whose tests run by
``.venv-peers/bin/python -m pytest tests/test_peers.py``.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from wscl_fast import ClusteredInfoNCE, clustered_infonce

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the benchmarks' way to import lightly


def missing(name: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"{name} is not installed (extra: peers)")


needs_metric_learning = missing("pytorch_metric_learning")
needs_lightly = missing("lightly")
TEMPERATURES = (0.07, 0.1, 0.5, 2.0)


def on_a_circle(degrees: list[float]) -> Tensor:
    """Unit vectors of two dimensions, as small tests of losses like to have them."""
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], 1)


# Vectors and labels: a few on a circle with a label that stands alone; many per label; one label only twice;
# vectors of other lengths than 1.
BATCHES = {
    "circle": (on_a_circle([0, 20, 40, 60, 80]), torch.tensor([0, 0, 1, 1, 2])),
    "circle, no label alone": (on_a_circle([10, 95, 180, 200, 300, 355]), torch.tensor([7, 7, 3, 3, 3, 7])),
    "many a label": (torch.randn(32, 16, dtype=torch.float64), torch.arange(32) % 3),
    "long vectors": (30 * torch.randn(24, 8, dtype=torch.float64), torch.arange(24) // 2),
    "float32": (torch.randn(64, 128), torch.arange(64) % 10),
}


def assert_alike(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *vectors: Tensor) -> None:
    """Values and the gradients of all vectors."""
    results = []
    for loss_fn in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in vectors]
        loss = loss_fn(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for mine, other in zip(*results, strict=True):
        size = float(other.abs().max())  # zero for the gradient of one dimension that is normalised
        tolerance = 1e-5 if other.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(
            mine, other, rtol=tolerance, atol=tolerance * max(size, 1e-3), check_dtype=False
        )


@needs_metric_learning
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", BATCHES)
def test_supcon_of_pytorch_metric_learning(name: str, temperature: float) -> None:
    from pytorch_metric_learning.losses import SupConLoss

    vectors, labels = BATCHES[name]
    theirs, ours = SupConLoss(temperature=temperature), ClusteredInfoNCE(temperature)
    assert_alike(lambda x: ours(x, labels), lambda x: theirs(x, labels), vectors)


@needs_metric_learning
@pytest.mark.parametrize("name", BATCHES)
def test_supcon_of_pytorch_metric_learning_with_references(name: str) -> None:
    from pytorch_metric_learning.losses import SupConLoss

    vectors, labels = BATCHES[name]
    references = torch.randn(40, vectors.shape[1], dtype=vectors.dtype)
    reference_labels = torch.randint(0, 6, (40,))
    theirs, ours = SupConLoss(temperature=0.2), ClusteredInfoNCE(0.2)
    assert_alike(
        lambda x, y: ours(x, labels, keys=y, key_clusters=reference_labels),
        lambda x, y: theirs(x, labels, ref_emb=y, ref_labels=reference_labels),
        vectors,
        references,
    )


@needs_metric_learning
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", [2, 3, 32])
def test_ntxent_of_pytorch_metric_learning_on_two_views(size: int, temperature: float) -> None:
    from pytorch_metric_learning.losses import NTXentLoss

    views = torch.randn(size, 2, 16, dtype=torch.float64)
    ids = torch.arange(size)
    theirs, ours = NTXentLoss(temperature=temperature), ClusteredInfoNCE(temperature)
    assert_alike(lambda x: ours(x, ids), lambda x: theirs(x.flatten(0, 1), ids.repeat_interleave(2)), views)


@needs_lightly
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", [2, 5, 32])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_ntxent_of_lightly(size: int, dim: int, temperature: float) -> None:
    from benchmarks.peers import lightly_ntxent

    one, two = torch.randn(2, size, dim, dtype=torch.float64)
    theirs, ours = lightly_ntxent(temperature), ClusteredInfoNCE(temperature)
    assert_alike(lambda a, b: ours(torch.stack([a, b], 1), torch.arange(size)), theirs, one, two)


@needs_lightly
def test_the_memory_bank_of_lightly() -> None:
    """One positive each and the bank as negatives: query i meets its own view and what lies in the bank."""
    from benchmarks.peers import lightly_ntxent

    theirs = lightly_ntxent(0.2, memory_bank_size=(50, 8))
    bank = theirs.memory_bank.bank.clone()
    one, two = torch.randn(2, 6, 8)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        a, b = normalize(a, dim=1), normalize(b, dim=1)
        rows = [
            clustered_infonce(
                a[i : i + 1],
                torch.cat([b[i : i + 1], bank]),
                query_clusters=torch.zeros(1, dtype=torch.int64),
                key_clusters=torch.arange(51),
                temperature=0.2,
            )
            for i in range(len(a))
        ]
        return torch.stack(rows).mean()

    assert_alike(ours, theirs, one, two)
