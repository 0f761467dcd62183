"""Where the time of a pass goes: samples of the processor's clock, taken by Linux's perf of both threads.

Usage: python -m benchmarks.stages [--only NAME] [--seconds S]

Hardware counters are hidden on most virtual machines; samples of the clock are not. A child process repeats
one pass of :mod:`benchmarks.bench_infonce`, and perf, attached once it runs, says which function each sample
fell into. ``waiting`` is a thread of the kernels with nothing to do: while the other finishes its part, or
runs Python and PyTorch.
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_infonce import QUEUE, Case, peak_of
from benchmarks.harness import keep, machine, show, step, write_csv

# The first that a symbol, or else its library, matches.
STAGES = (
    ("products", r"(logits|gather|scatter)_(panel|by_tiles)"),
    ("epilogue", r"Epilogues<|weigh|exp2"),
    ("norms", r"largest_norm"),
    ("clusters", r"sum_columns|segment|Segments|add_slices|pull_|Grouping|group|Meeting|meet\("),
    ("packing, writing", r"wscl::|memset|memcpy|memmove"),
    ("waiting", r"libgomp"),
    ("pages", r"\[kernel|\[k\]"),
    ("PyTorch, Python", r"libtorch|libc10|libpython|python|libc\.so|libstdc|vdso|ld-linux|libm\."),
)
CASES = [
    *(Case(256, 4096, d) for d in (64, 128)),
    Case(1024, 4096, 128),
    *(Case(256, 65536, d) for d in (64, 128, 256)),
    Case(1024, 65536, 128),
    Case(256, QUEUE, 128, kind="queue"),
    Case(1024, 1024, 128, kind="in-batch"),
    *(Case(256, 4096, d, torch.bfloat16) for d in (64, 128)),
    Case(1024, 4096, 64, torch.bfloat16),
    Case(256, 65536, 64, torch.bfloat16),
    Case(256, QUEUE, 64, torch.bfloat16, "queue"),
]


def repeat(case_name: str, pass_name: str, threads: int) -> None:
    """The child: one pass until it is told to stop; then the seconds of a call, and of the peak before."""
    torch.set_num_threads(threads)
    case = next(c for c in CASES if c.name == case_name)
    gradients = next(p.gradients for p in case.passes if p.name == pass_name)
    run = step(case.loss, case.inputs(), gradients)
    peaks = [peak_of(case.dtype)(threads) for _ in range(9)]
    peak = statistics.quantiles(peaks, n=4)[2]  # what disturbs it can only lower it
    for _ in range(3):
        run()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    print("ready", flush=True)
    seconds = []
    while not stopped:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), peak, flush=True)


def perf(*arguments: str) -> str:
    """What perf prints; where it fails, an error with what it says, such as who may not record."""
    done = subprocess.run(["perf", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"perf {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def samples(case: Case, pass_name: str, seconds: float) -> tuple[dict[str, float], float, float]:
    """The share of samples in each stage, the median seconds of a call, and the peak in flops a second."""
    arguments = [sys.executable, "-m", "benchmarks.stages", "--repeat", case.name, pass_name]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        data = str(Path(folder) / "data")
        try:
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{case.name}, {pass_name}: the child did not come up")
            clock = ["-q", "-e", "cpu-clock", "-F", "4999", "-p", str(child.pid), "-o", data]
            perf("record", *clock, "--", "sleep", str(seconds))
        finally:
            child.terminate()  # it runs until then, and is waited for
        median, peak = map(float, child.stdout.readline().split())
        ask = ["-i", data, "--no-children", "-g", "none", "-t", ";", "-q", "--sort", "dso,symbol"]
        report = perf("report", *ask, "-F", "overhead,dso,symbol")
    shares: dict[str, float] = collections.defaultdict(float)
    for line in report.splitlines():
        if line.count(";") < 2:
            continue
        share, library, symbol = (part.strip() for part in line.split(";", 2))
        where = next((name for name, pattern in STAGES if re.search(pattern, symbol)), None)
        where = where or next((name for name, pattern in STAGES if re.search(pattern, library)), "other")
        shares[where] += float(share.rstrip("%")) / 100
    return shares, median, peak


def rows_of(case: Case, seconds: float) -> list[dict[str, object]]:
    """A row for each pass."""
    rows: list[dict[str, object]] = []
    for p in case.passes:
        shares, median, peak = samples(case, p.name, seconds)
        work = 2 * case.n * case.m * case.d * p.gemms
        row: dict[str, object] = {
            "case": case.name,
            "pass": p.name,
            "ms": f"{1e3 * median:.3f}",
            "share of peak": f"{work / (median * peak):.3f}",
        }
        names = [*(name for name, _ in STAGES), "other"]
        rows.append(row | {f"{name} %": f"{100 * shares[name]:.1f}" for name in names})
    return rows


def main() -> None:
    """Every case, or those asked for; the others' rows stay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="part of a case's name")
    parser.add_argument("--seconds", type=float, default=3.0, help="of samples, for each pass")
    parser.add_argument("--repeat", nargs=2, metavar=("CASE", "PASS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeat:
        repeat(*options.repeat, torch.get_num_threads())
        return
    if not shutil.which("perf"):
        sys.exit("benchmarks.stages: perf is missing: apt install linux-perf")
    print(machine())
    rows: list[dict[str, object]] = []
    for case in CASES:
        if options.only in case.name:
            found = rows_of(case, options.seconds)
            show(found)
            rows += found
    if not rows:
        sys.exit(f"benchmarks.stages: --only {options.only}: no case has that in its name")
    write_csv("stages", keep("stages", rows, [case.name for case in CASES]))


if __name__ == "__main__":
    main()
