"""What ptxas gave each kernel, from the logs of ``make cuda`` and ``make cuda-all``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from simulator import ROOT

LOG = ROOT / "build" / "cuda" / "ptxas.log"  # one architecture
LOG_OF_ALL = ROOT / "build" / "cuda-all" / "ptxas.log"


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    kernel: str  # mangled
    arch: str
    registers: int
    spill_stores: int  # bytes
    spill_loads: int


def read(text: str) -> Iterator[Resources]:
    """Every kernel of a log of ``ptxas -v``."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for found in entry.finditer(text):
        yield Resources(
            found["kernel"], found["arch"], int(found["registers"]), int(found["stores"]), int(found["loads"])
        )
