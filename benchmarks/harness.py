"""What every benchmark shares: interleaved timing, the machine's peak, peak memory, tables of results.

Machines are shared and noisy, so an absolute time says little. The sides of a comparison take turns
(A B C, A B C, …) in one process, and reported is the median over the turns of the ratio within a turn.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import wscl_fast
from wscl_fast import _C
from wscl_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Another machine's results have a folder of their own.
RESULTS = Path(os.environ.get("WSCL_RESULTS", Path(__file__).parent / "results"))
SHORT = 0.1  # seconds: threads that were woken on one core stay there for some milliseconds
IDLE = 0.005  # until torch's threads no longer spin
_PEAK = "peak of"  # how a child marks its lines


def at_least_one(text: str) -> int:
    """The type of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_counts(parser: argparse.ArgumentParser, turns: int | None, said: str = "") -> None:
    """The options of what is timed in turns; ``said``: how many where there is no one default."""
    parser.add_argument("--threads", type=at_least_one, default=os.cpu_count(), help="default: all cores")
    told = f"how often each side is timed (default: {said or turns})"
    parser.add_argument("--turns", type=at_least_one, default=turns, help=told)


def check_only(parser: argparse.ArgumentParser, only: str, names: Sequence[str]) -> None:
    """Ends the command where ``--only`` is part of no name: nothing would be measured without a word."""
    if not any(only in name for name in names):
        parser.error(f"--only: expected a part of one of {list(names)}, got {only!r}")


class Seconds(float):
    """What a side returns that took its own time, in another process perhaps."""


@dataclass(frozen=True)
class Timing:
    """One side of a comparison: seconds of every turn, and the multiply-add peak measured beside it."""

    seconds: tuple[float, ...]
    peak: tuple[float, ...]  # flops a second

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def share(self, flops: float) -> float:
        """Share of the peak that ``flops`` in this time make: the median over the turns."""
        pairs = zip(self.seconds, self.peak, strict=True)
        return statistics.median(flops / (seconds * peak) for seconds, peak in pairs)

    def times_faster_than(self, other: Timing) -> float:
        """Median over the turns of the other side's time to this one's."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


def _timed(side: Callable[[], object], calls: int = 1) -> tuple[float, object]:
    """Seconds of one of several calls, and what the last one returned."""
    start = time.perf_counter()
    for _ in range(calls):
        took = side()
    return (time.perf_counter() - start) / calls, took


def interleave(
    sides: dict[str, Callable[[], object]],
    *,
    turns: int = 7,
    peak: Callable[[int], float] = _C.multiply_add_peak,
    peaks: Mapping[str, Callable[[int], float]] | None = None,
    warm: bool = True,
) -> dict[str, Timing]:
    """Times every side once a turn, after a warm-up of each; the peak is measured before each of them.

    ``peaks`` has those of sides whose products are made by another instruction.

    A side that takes less than ``SHORT`` is called until that has gone by, after one call that is not timed:
    the threads of the peak are not those of torch, which have to be woken and placed anew.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    flops: dict[str, list[float]] = {name: [] for name in sides}
    of_side = {name: (peaks or {}).get(name, peak) for name in sides}
    calls = dict.fromkeys(sides, 1)
    for name, side in sides.items() if warm else ():
        elapsed, took = _timed(side)
        if elapsed < 10 * SHORT and not isinstance(took, Seconds):  # the first call is no measure
            calls[name] = max(1, round(SHORT / _timed(side)[0]))
    for _ in range(turns):
        for name, side in sides.items():
            time.sleep(IDLE)
            flops[name].append(of_side[name](torch.get_num_threads()))
            if calls[name] > 1:
                side()
            elapsed, took = _timed(side, calls[name])
            seconds[name].append(float(took) if isinstance(took, Seconds) else elapsed)
    return {name: Timing(tuple(seconds[name]), tuple(flops[name])) for name in sides}


def step(
    loss: Callable[..., Tensor], arguments: dict[str, Any], gradients: Sequence[str]
) -> Callable[[], Tensor]:
    """One pass of a loss; backward too, where any of the arguments named in ``gradients`` is given."""

    def run() -> Tensor:
        leaves = {name: arguments[name].detach().requires_grad_() for name in gradients if name in arguments}
        with torch.set_grad_enabled(bool(leaves)):
            value = loss(**{**arguments, **leaves})
        if leaves:
            value.backward()
        return value.detach()

    return run


def peak_memories(script: str, *, timed: bool = False) -> dict[str, float]:
    """MiB by which a child process grows at most while it runs each of ``measured`` of a script (Linux).

    Nothing is in reserve, and freed memory is given back at once, so that what was held at one time counts:
    glibc would keep up to 64 MiB of it or none, as the sizes that came before had it. That takes time: what
    is ``timed`` too runs without. What the script prints goes to the terminal.
    """
    wrapped = f"""
{script}
import ctypes, gc
from wscl_fast import _C
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
for name, side in measured.items():
    gc.collect()
    _C.empty_reserve()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = resident("VmRSS")
    side()
    print("{_PEAK}", name, (resident("VmHWM") - before) / 1024, sep="|", flush=True)
"""
    environment = {**os.environ, **({} if timed else {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})}
    command = [sys.executable, "-c", wrapped]
    peaks: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout or ():
            mark, *fields = line.rstrip().split("|")
            if mark == _PEAK:
                peaks[fields[0]] = float(fields[1])
            else:
                print(line, end="", flush=True)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return peaks


def peak_memory(script: str, *, timed: bool = False) -> float:
    """The same of the one function ``measured``."""
    return peak_memories(f"{script}\nmeasured = {{'': measured}}", timed=timed)[""]


def machine() -> str:
    """The processor's name, how many threads run on it, and with what."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    info = wscl_fast.build_info()
    return (
        f"{name} ({os.cpu_count()} cores), {torch.get_num_threads()} threads, {info.instruction_set},"
        f" torch {torch.__version__}, wscl_fast {info.version}"
    )


def write_csv(name: str, rows: Sequence[dict[str, object]]) -> Path:
    """Rows of one table into ``results/<name>.csv``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with replacing(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_figure(figure: Figure, name: str) -> None:
    """A figure into ``results/<name>.png``."""
    figure.tight_layout()
    with replacing(RESULTS / f"{name}.png") as beside:
        figure.savefig(beside, dpi=130)


def keep(table: str, rows: list[dict[str, object]], order: Sequence[str]) -> list[dict[str, object]]:
    """The new rows with those of the table's other cases, in the order of the cases."""
    path = RESULTS / f"{table}.csv"
    new = {row["case"] for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if row.get("case") not in new]
        rows = [{name: row.get(name, "") for name in rows[0]} for row in old] + rows
    rows = [row for row in rows if row["case"] in order]
    return sorted(rows, key=lambda row: order.index(str(row["case"])))


def show(rows: Sequence[dict[str, object]]) -> None:
    """A table for the terminal."""
    cells = [[str(name) for name in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
