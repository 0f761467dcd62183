"""The simulated library that CMake builds, which most tests here run, has the bits of one built by ptxsim."""

from __future__ import annotations

import pytest
import torch
from mutations import build, run_pass
from simulator import built_by_cmake, library, ptxsim

pytestmark = pytest.mark.simulated


def test_results_are_the_same_bits() -> None:
    """One pass stands for all kernels: they are compiled with the same options."""
    ptxsim()  # skips where there is none
    if built_by_cmake() is None:
        pytest.skip("no build/simulator/libwscl_simulated.so of these sources: make test builds it by CMake")
    assert library()._name == str(built_by_cmake())
    found, alone = (
        run_pass(entry, "float32") for entry in (library().wscl_similarity, build("float32").wscl_pass)
    )
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)
