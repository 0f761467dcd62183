"""The guide's snippets run as printed, given the names that its text speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import wscl_fast

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
N, D = 2048, 128


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader has by then: features with ids, a queue, files, an encoder, a process group."""
    monkeypatch.chdir(tmp_path)
    features = normalize(torch.randn(N, D), dim=1)
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards" / "0.npy", features.numpy())
    clusters, samples = torch.arange(N) % 40, torch.arange(N)
    queue = wscl_fast.ClusterQueue(4096, D)
    queue.enqueue(features, clusters, samples)
    known: dict[str, Any] = {
        **{name: getattr(wscl_fast, name) for name in wscl_fast.__all__},
        "torch": torch,
        "nn": nn,
        "DistributedDataParallel": DistributedDataParallel,
        "features": features.clone().requires_grad_(),
        "momentum_features": features,
        "clusters": clusters,
        "clusters_of_samples": clusters,
        "of_cluster": torch.linspace(0.1, 0.5, 40),
        "samples": samples,
        "tags": 1 << clusters,
        "views": torch.randn(16, 2, D),
        "epoch": 5,
        "loss_fn": wscl_fast.ClusteredInfoNCE(),
        "queue": queue,
        "sampler": SimpleNamespace(refresh=lambda clusters: None),
        "make_encoder": lambda: nn.Linear(D, 8),
    }
    yield known
    known.clear()  # a wrapper for several processes has to go before its group


@pytest.fixture
def group(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("PyTorch was built without gloo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    names["clusters"] = names["clusters"][:16]
    yield
    names.clear()
    dist.destroy_process_group()


def run(number: int, names: dict[str, Any]) -> None:
    exec(compile(SNIPPETS[number], f"guide.md snippet {number}", "exec"), names)


ALONE = [number for number, snippet in enumerate(SNIPPETS) if "DistributedDataParallel" not in snippet]


@pytest.mark.parametrize("number", ALONE)
def test_snippets_run_as_printed(number: int, names: dict[str, Any]) -> None:
    run(number, names)


def test_the_snippet_of_several_processes(names: dict[str, Any], group: None) -> None:
    (number,) = set(range(len(SNIPPETS))) - set(ALONE)
    run(number, names)
    encoder = names["model"].module.encoder
    assert encoder.weight.grad.abs().sum() > 0
    assert names["model"].module.loss_fn.log_scale.grad is not None


def test_the_guide_has_snippets() -> None:
    assert len(ALONE) >= 4
