"""The simulator's detectors are alive on the k-means kernels: with one thing taken out, a fault is found.

The change is made in a copy of the sources, so that the kernels need no hooks for tests.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from simulated_kmeans import run
from simulator import CSRC, ptxsim

pytestmark = pytest.mark.simulated

EVERYTHING = os.environ.get("WSCL_SIMULATE") == "all"


@dataclass(frozen=True)
class Change:
    """What is taken out of a file, where it stands once, and the faults of which one has to be found."""

    name: str
    file: str
    text: str
    faults: tuple[str, ...]
    replacement: str = ""
    rows: int = 2100

    def __str__(self) -> str:
        return self.name


RACES = ("shared-race", "async-copy-race", "uninitialised-shared")
BOUNDS = ("out-of-bounds", "uninitialised-global")
CHANGES = [
    Change("tile-barrier", "kmeans_scan_cuda.cuh", "__syncthreads();  // everyone's copies", RACES, "//"),
    Change("tile-wait", "kmeans_scan_cuda.cuh", "copy_wait<T::kStages - 2>();", RACES),
    Change("next-item", "kmeans_again_cuda.cu", "__syncthreads();  // every warp", RACES, "//", rows=34_500),
    Change("next-round", "kmeans_sort_cuda.cu", "__syncthreads();  // `next` and", RACES, "//"),
    Change("round-read", "kmeans_sort_cuda.cu", "__syncthreads();  // everyone has read", RACES, "//"),
    Change("chunk", "kmeans_sums_cuda.cu", "__syncthreads();  // the chunk's rows", RACES, "//"),
    Change("rows", "kmeans_scan_cuda.cuh", "return row0 + row < rows.count;", BOUNDS, "return true;"),
    Change("cleared", "kmeans_cuda.cu", "zero(p.sums, p.k * p.d * 8);", BOUNDS),
]


@pytest.mark.parametrize("change", CHANGES if EVERYTHING else CHANGES[:1], ids=str)
def test_a_change_is_caught(change: Change, tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "core" / change.file
    text = source.read_text()
    assert text.count(change.text) == 1, (
        f"{change.file}: {change.text!r} is there {text.count(change.text)} times"
    )
    source.write_text(text.replace(change.text, change.replacement))

    torch.manual_seed(0)
    # Ties, for rows that the first scan leaves undecided. Many: every centroid twice, side by side, so that
    # one lane has both and no row is decided.
    many = change.rows > 10_000
    x = torch.randn(change.rows, 4 if many else 40).round()
    centroids = x[:3].repeat_interleave(2, 0) if many else x[:300]
    sim = ptxsim()
    sim.set_option("QUIET", True)
    try:
        with pytest.raises((sim.KernelFault, AssertionError)):
            run(x, centroids, update=True, csrc=csrc)
        kinds = {fault["kind"] for fault in sim.faults()}
        assert kinds & set(change.faults), kinds
    finally:
        sim.reset()
        sim.set_option("QUIET", False)
