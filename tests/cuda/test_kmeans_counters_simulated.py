"""What the CUDA k-means kernels execute: one product, no N × K traffic, no float atomics, no conflicts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from kmeans_counters import MACS_OF_AN_INSTRUCTION, parts_of, problem
from simulated_kmeans import library, run
from simulator import CSRC, built_by_cmake, ptxsim

pytestmark = pytest.mark.simulated

EVERYTHING = os.environ.get("WSCL_SIMULATE") == "all"
STATE_BYTES = 4 * (
    4 + 4 + 4
)  # of a row and a part of the columns: two scores and a column for each of four lanes


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_product_and_nothing_of_its_size_in_memory(d: int, dtype: torch.dtype) -> None:
    """float32 is not split: the candidates' product is one of float16 for every dtype."""
    n, k = (70_000, 1000) if EVERYTHING and dtype == torch.float32 else (2048, 1000)
    got = run(*problem(n, k, d, dtype), update=True)
    parts = parts_of(got)
    scan = parts["scan"]
    assert 1 <= scan.matrix_instructions * MACS_OF_AN_INSTRUCTION / (n * k * d) <= 1.03
    assert scan.passes == scan.ideal_passes
    assert scan.coalescing() > 0.95
    splits = scan.written // (n * STATE_BYTES)
    assert scan.written == n * STATE_BYTES * splits
    assert splits == 1 or n < 70_000
    assert not any(part.matrix_instructions for name, part in parts.items() if name not in ("scan", "second"))
    # Beside the scan's states, what is written is O((n + k) d).
    others = sum(part.written for name, part in parts.items() if name != "scan")
    assert others < 12 * (n + k) * (d + 16) + 2**20
    assert parts["rows"].coalescing() > 0.9
    assert parts["sums"].passes == parts["sums"].ideal_passes
    assert all(part.local == 0 for name, part in parts.items() if name != "second")
    assert parts["second"].matrix_instructions <= 0.1 * scan.matrix_instructions + 128 * k * d * 4


@pytest.mark.parametrize("k", [1, 8, 9, 63, 65, 100])
def test_the_last_tile_multiplies_the_eights_of_columns_that_exist(k: int) -> None:
    """Which any GEMM by instructions of eight columns does."""
    n, d = 2048, 64
    scan = parts_of(run(*problem(n, k, d)))["scan"]
    assert scan.matrix_instructions * MACS_OF_AN_INSTRUCTION == n * ((k + 7) // 8 * 8) * d


def test_reads_of_the_scan_grow_with_rows_and_columns_alone() -> None:
    d, k = 64, 512
    reads = [parts_of(run(*problem(n, k, d)))["scan"].unique for n in (1024, 2048)]
    assert reads[1] < 2.01 * reads[0]
    reads = [parts_of(run(*problem(1024, k, d)))["scan"].unique for k in (256, 512)]
    splits = 8
    assert reads[1] - reads[0] <= 256 * (2 * d + 4) + splits * 1024 * STATE_BYTES


def test_no_float_atomics() -> None:
    """Of all atomic instructions in the PTX, none adds floats."""
    built = built_by_cmake() or Path(library()._name)
    atomics = re.findall(rb"(?<![a-z])(?:atom|red)\.[a-z0-9_.:]+", built.read_bytes())
    assert atomics
    assert not [name for name in atomics if re.search(rb"\.(b?f16|f32|f64)", name)]


@pytest.mark.skipif(not EVERYTHING, reason="make simulate: nvcc compiles for each architecture")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_nothing_spills(arch: str) -> None:
    sources = sorted((CSRC / "core").glob("kmeans*.cu"))
    kernels = ptxsim().sass_stats(sources, arch=arch, include_dirs=[CSRC])["kernels"]
    assert len(kernels) > 20
    for name, facts in kernels.items():
        assert facts["spill_stores"] == facts["spill_loads"] == 0, name
        if "scan_kernel" in name:
            assert facts["registers"] <= 168, name  # three CTAs of 128 threads a multiprocessor
