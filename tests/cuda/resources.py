"""What ptxas gave each kernel, from the logs of ``make cuda`` and its like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simulator import ROOT, with_headers

LOG = ROOT / "build" / "cuda" / "ptxas.log"  # make build/cuda/.built, or cuda where no simulator is
SIMULATOR_LOG = ROOT / "build" / "simulator" / "ptxas.log"  # make cuda


def logs() -> list[Path]:
    """Those that there are, of one architecture each, of the sources as they are."""
    sources = with_headers((ROOT / "csrc" / "core").glob("*.cu"))
    newest = max(path.stat().st_mtime for path in sources)
    found = [SIMULATOR_LOG, LOG, *sorted((ROOT / "build" / "cuda-all").glob("*/ptxas.log"))]
    return [log for log in found if log.exists() and log.stat().st_mtime >= newest]


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
