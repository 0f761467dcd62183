"""Builds of the similarity pass with one thing taken out: what each detector has to notice.

A mutation changes text in a copy of the sources, so that the kernels need no hooks for tests. Text
that is not there as often as it should be is an error: a mutation that changes nothing proves nothing.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from simulator import (
    BFLOAT16,
    COLUMNS,
    CSRC,
    FLOAT32,
    SOFTMAX,
    SYMMETRIC,
    Device,
    SimilarityParams,
    ptxsim,
    rows,
)
from torch import Tensor


@dataclass(frozen=True)
class Mutation:
    """A change of the sources and the faults of which one has to be found."""

    name: str
    pattern: str  # regular expression over csrc/core/similarity_*.cuh
    replacement: str
    faults: frozenset[str]
    precision: str = "bfloat16"
    times: int = 1

    def __str__(self) -> str:
        return self.name


def mutate(mutation: Mutation, folder: Path) -> Path:
    """A copy of ``csrc`` with the change made."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    found = 0
    for path in sorted((csrc / "core").glob("similarity_*.cuh")):
        text, times = re.subn(mutation.pattern, mutation.replacement, path.read_text())
        found += times
        path.write_text(text)
    if found != mutation.times:
        raise AssertionError(f"{mutation}: {mutation.pattern!r} found {found} times, not {mutation.times}")
    return csrc


@functools.cache
def build(precision: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """The pass of one precision at d ≤ 64, out of these sources."""
    sim = ptxsim()
    source, defines = Path(__file__).parent / "pass_entry.cu", [f"WSCL_{precision.upper()}"]
    return sim.load(sim.compile_kernels(source, include_dirs=[csrc], defines=defines))


def run_pass(entry: Callable[..., int], precision: str) -> list[Tensor]:
    """What the three epilogues make of ragged sizes, rows that are not aligned among them."""
    made = []
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    torch.manual_seed(0)
    for epilogue, (n, m, d) in (
        (SOFTMAX, (65, 300, 64)),
        (COLUMNS, (65, 300, 64)),
        (SYMMETRIC, (130, 130, 64)),
        (SOFTMAX, (65, 300, 33)),
    ):
        with Device() as device:
            x = device.put(torch.randn(n, d).to(dtype), "x")
            y = x if epilogue == SYMMETRIC else device.put(torch.randn(m, d).to(dtype), "y")
            vectors = [device.put(torch.ones(384), "vectors") for _ in range(4)]
            shifts = device.put(torch.ones(1, dtype=torch.int32), "shifts")  # one
            scale, splits, stride = device.put(torch.tensor([0.1]), "scale"), 2, -(-d // 4) * 4
            outputs = [device.empty(splits, n, name="shift"), device.empty(splits, n, name="sum")]
            output = device.empty(splits, n, stride, name="output")
            params = SimilarityParams(
                precision={"bfloat16": BFLOAT16, "float32": FLOAT32}[precision],
                epilogue=epilogue,
                x=rows(x),
                y=rows(y),
                d=d,
                scale=scale.data_ptr(),
                row_shift=vectors[0].data_ptr(),
                row_weight=vectors[1].data_ptr(),
                column_shift=vectors[2].data_ptr(),
                column_weight=vectors[3].data_ptr(),
                shifts=shifts.data_ptr(),
                splits=splits,
                shift=outputs[0].data_ptr(),
                sum=outputs[1].data_ptr(),
                output=output.data_ptr(),
                output_stride=stride,
            )
            assert entry(ctypes.byref(params), None) == 0
        made += [*outputs, output]
    return made
