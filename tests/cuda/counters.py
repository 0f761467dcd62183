"""What a loss costs on the device, as the simulator counts it, beside what the algorithm and its tiles need.

Counts are facts about the PTX that nvcc emits; nothing here is a time. ``docs/kernels.md`` has the tables
(``python tests/cuda/tables.py`` writes them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from simulated_infonce import run
from torch.nn.functional import normalize

Report = dict[str, Any]

# GEMMs (N·M·d multiply-adds each) of the algorithm: forward and backward.
GEMMS = {"keys detached": 2.0, "both gradients": 4.0, "in batch": 2.5}
TERMS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 6}  # products of the tensor core for one
ROWS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}  # of a CTA
SECTOR = 32


def launches(kind: str, n: int, m: int, d: int, dtype: torch.dtype, arch: str = "90") -> list[Report]:
    """The reports of forward and backward, "out", of unit vectors in 50 clusters."""
    torch.manual_seed(0)
    queries, keys = (normalize(torch.randn(rows, d), dim=1).to(dtype) for rows in (n, m))
    in_batch = kind == "in batch"
    return run(
        queries,
        None if in_batch else keys,
        torch.randint(50, (n,)),
        None if in_batch else torch.randint(50, (m,)),
        grad_loss=torch.full((n,), 1 / n),
        need_keys=kind != "keys detached",
        arch=arch,
    ).launches


def is_pass(report: Report) -> bool:
    """Whether a launch is one over all pairs (and was made: a pass may find that another takes its place)."""
    return any(report["mma_macs"].values())


@dataclass(frozen=True)
class Pass:
    """One launch over pairs of rows and columns."""

    report: Report
    n: int
    m: int
    d: int
    dtype: torch.dtype

    @property
    def epilogue(self) -> str:
        number = re.search(r"Epilogue\)(\d)", self.report["kernel"])
        assert number, self.report["kernel"]
        return ("softmax", "columns", "symmetric", "both")[int(number[1])]

    @property
    def output(self) -> bool:
        return ", true>" in self.report["kernel"]

    @property
    def gemms(self) -> float:
        """Multiply-adds over N·M·d: of a float32 product those of one term."""
        (macs,) = self.report["mma_macs"].values()
        return float(macs / (TERMS[self.dtype] * self.n * self.m * self.d))

    @property
    def pairs(self) -> float:
        """Pairs that are met."""
        return self.gemms / (2 if self.output else 1) * self.n * self.m

    @property
    def exponentials(self) -> float:
        """For each pair."""
        return float(self.report["class_lanes"]["mufu"] / self.pairs)

    @property
    def sectors(self) -> float:
        """Of global memory, over those that the tiles need: X once a CTA, Y once a block of rows, results."""
        traffic = self.report["global"]
        splits, size = self.report["grid"][1], self.dtype.itemsize
        columns = self.pairs / ROWS[self.dtype]  # that blocks of rows meet, all together
        needed = (splits * self.n + columns) * self.d * size
        if self.epilogue in ("columns", "symmetric"):
            needed += columns * 8  # shifts and weights
        if self.epilogue == "symmetric":
            needed += splits * self.n * 8
        if self.epilogue == "softmax":
            needed += splits * self.n * 8
        if self.epilogue == "both":
            needed += columns * 4 + splits * self.n * 4
        if self.output:
            needed += splits * self.n * self.d * 4
        return float((traffic["load_sectors"] + traffic["store_sectors"]) * SECTOR / needed)

    @property
    def coalescing(self) -> float:
        """Bytes asked for over bytes of the sectors that were moved."""
        traffic = self.report["global"]
        moved = (traffic["load_sectors"] + traffic["store_sectors"]) * SECTOR
        return min(1.0, float(traffic["load_bytes"] + traffic["store_bytes"]) / moved)

    @property
    def shared(self) -> float:
        """Passes over the banks, over those without conflicts."""
        return float(self.report["shared"]["passes"] / self.report["shared"]["ideal_passes"])

    @property
    def issue(self) -> float:
        """Warp instructions of PTX for each matrix instruction."""
        return float(self.report["warp_instructions"] / self.report["classes"]["mma"])

    @property
    def occupancy(self) -> tuple[int, int]:
        """CTAs of a multiprocessor that shared memory allows, on sm_80 (164 KiB) and sm_90 (228 KiB)."""
        each = self.report["dynamic_smem"] + self.report["static_smem"] + 1024  # 1 KiB is the system's
        return tuple(kib * 1024 // each for kib in (164, 228))  # type: ignore[return-value]


def passes(kind: str, n: int, m: int, d: int, dtype: torch.dtype, arch: str = "90") -> list[Pass]:
    """The passes of a loss's forward and backward, in order."""
    reports = launches(kind, n, m, d, dtype, arch)
    return [Pass(r, n, m, d, dtype) for r in reports if is_pass(r)]
