"""No loss makes a GPU's host wait, so that a CUDA graph can capture it: as far as that shows without one.

Fake tensors have no values, so whoever looks at one fails; a number that is made on the host and copied shows
as it is lifted. On a GPU test_infonce_gpu.py asks the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LOSSES, problem
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode


class NothingFromTheHost(TorchDispatchMode):
    """Refuses tensors that are made of the host's numbers."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten.lift_fresh.default, "a tensor is made on the host"
        return function(*args, **(kwargs or {}))


def step(name: str, temperature: str) -> None:
    """Forward and backward of fake tensors, with all gradients."""
    q, k, qc, kc = problem(30, 40, 16, seed=0)
    temperatures = torch.full((30,) if temperature == "rows" else (), 0.5)
    fake = FakeTensorMode()
    q, k, temperatures = (fake.from_tensor(x.float()).requires_grad_() for x in (q, k, temperatures))
    qc, kc = fake.from_tensor(qc), fake.from_tensor(kc)
    value, leaves = (0.5, [q, k]) if temperature == "number" else (temperatures, [q, k, temperatures])
    with fake, NothingFromTheHost():
        loss = LOSSES[name](q, k, qc, kc, temperature=value, impl="fused")
        torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("temperature", ["number", "tensor", "rows"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits(name: str, temperature: str) -> None:
    if temperature == "rows" and name in ("clip", "siglip"):
        pytest.skip("one temperature for both sides")
    step(name, temperature)


def test_whoever_looks_or_makes_is_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(()).item()
    with FakeTensorMode(), NothingFromTheHost(), pytest.raises(AssertionError, match="made on the host"):
        torch.tensor(0.5)
