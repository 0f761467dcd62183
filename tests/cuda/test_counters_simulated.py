"""The kernels do as much as the algorithm asks for and no more: the simulator's counts, and ptxas's word."""

from __future__ import annotations

import os
import re

import pytest
import torch
from counters import GEMMS, TERMS, passes
from floor import find_floor
from resources import Resources, logs, read

pytestmark = pytest.mark.simulated

EVERYTHING = os.environ.get("WSCL_SIMULATE") == "all"
# float32 beyond d = 128 streams: similarities are computed anew for every slice of the output.
COUNTED = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 128)]
COUNTED += [(torch.float32, 64), (torch.float32, 128)]
FLOORS = [(device, kind) for device in (["H100", "A100"] if EVERYTHING else ["H100"]) for kind in GEMMS]
CTAS = {64: 2, 128: 2, 256: 1}  # of a multiprocessor, for numbers of 2 bytes, by design
# PTX instructions a matrix instruction, for numbers of 2 bytes: with a second product and without.
ISSUE = {64: (8.6, 15.5), 128: (5.6, 8.6), 256: (5.2, 8.0)}


@pytest.mark.parametrize("kind", GEMMS)
@pytest.mark.parametrize(("dtype", "d"), COUNTED, ids=str)
def test_counts(kind: str, dtype: torch.dtype, d: int) -> None:
    found = passes(kind, 1024, 1024, d, dtype)
    assert found
    assert sum(p.gemms for p in found) == pytest.approx(GEMMS[kind], rel=0.03)
    for p in found:
        assert p.exponentials == pytest.approx(1, rel=1e-3), p.epilogue
        assert p.sectors <= 1.05, p.epilogue
        assert p.coalescing >= 0.95, p.epilogue
        assert p.shared <= 1.05, p.epilogue
        if TERMS[dtype] == 1:
            assert min(p.occupancy) >= CTAS[d], p.epilogue
            assert p.issue <= ISSUE[d][0 if p.output else 1], p.epilogue


@pytest.mark.parametrize(("device", "kind"), FLOORS)
def test_floor(device: str, kind: str) -> None:
    floor = find_floor(device, kind, 8192, 128)
    assert floor.ratio <= 1.3, floor


def test_a_log_of_ptxas_is_read() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3one' for 'sm_80'
ptxas info    : Function properties for _Z3one
    16 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 632 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3two' for 'sm_90'
ptxas info    : Function properties for _Z3two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers, 736 bytes cmem[0], 168 bytes cmem[2]
"""
    assert list(read(log)) == [
        Resources("_Z3one", "80", 255, 24, 36),
        Resources("_Z3two", "90", 48, 0, 0),
    ]


@pytest.fixture(scope="module")
def kernels() -> list[Resources]:
    if not logs():
        pytest.skip("no ptxas.log of these sources in build/: make test writes it where nvcc is present")
    return [r for log in logs() for r in read(log.read_text()) if "kmeans" not in r.kernel]


def test_nothing_spills(kernels: list[Resources]) -> None:
    # On every architecture that was compiled for: one by make test, all of them by make cuda-all.
    assert len(kernels) > 20
    spilling = {(r.kernel, r.arch): (r.spill_stores, r.spill_loads) for r in kernels if r.spill_stores}
    assert not spilling


def test_registers_allow_the_occupancy_of_the_design(kernels: list[Resources]) -> None:
    for d, ctas in CTAS.items():
        threads = 256 if d == 256 else 128
        name = re.compile(rf"similarity_kernelINS0_(?:\d+[A-Za-z]+INS0_)?10HalfTiling\w*?ELi{d}ELb[01]EEE")
        halves = [r for r in kernels if name.search(r.kernel)]
        assert halves, f"no kernel of d = {d}"
        for r in halves:
            # Registers are given to warps in portions of 8 a thread.
            assert ctas * threads * (-(-r.registers // 8) * 8) <= 65536, r
