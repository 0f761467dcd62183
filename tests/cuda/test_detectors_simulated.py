"""The simulator's detectors are alive on our own kernels: a build without its barrier has to be caught."""

from __future__ import annotations

import pytest
import torch
from simulated_infonce import run
from simulator import ptxsim

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_missing_barrier_is_caught(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sim = ptxsim()
    sim.set_option("QUIET", True)
    try:
        with pytest.raises((sim.KernelFault, AssertionError)):
            run(
                torch.randn(65, 64).to(dtype),
                torch.randn(300, 64).to(dtype),
                torch.zeros(65, dtype=torch.int64),
                torch.zeros(300, dtype=torch.int64),
                defines=("WSCL_WITHOUT_TILE_BARRIER",),
            )
        kinds = {fault["kind"] for fault in sim.faults()}
        assert kinds & {"shared-race", "async-copy-race", "uninitialised-shared"}, kinds
    finally:
        sim.reset()
        sim.set_option("QUIET", False)
