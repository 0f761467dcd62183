"""Builds of the similarity pass with one thing taken out: what each detector has to notice.

A mutation changes text in a copy of the sources, so that the kernels need no hooks for tests. Text
that is not there as often as it should be is an error: a mutation that changes nothing proves nothing.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from simulator import CSRC, ptxsim


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
