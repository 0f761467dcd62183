"""``make gpu``: tests and sanitizer, then benchmarks on the GPU of this machine, in one go, to one report.

Usage: python -m benchmarks.gpu_report [--minutes 10] [--out FILE] [--check]

Without a usable GPU it says so in one line and exits with status 2. Each step has a limit of its own and none
runs past the end; what failed, was skipped or was cut off stands in the report, which names the device, the
driver and the versions. Exit status: 0 where every step went well, else 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import wscl_fast
from wscl_fast import _ops
from wscl_fast.files import write_text

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "results" / "gpu.md"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = "tests/cuda/sanitized.py"
BENCHMARKS = {"benchmarks of the loss": "bench_cuda", "benchmarks of k-means": "bench_cuda_kmeans"}
# Every tensor is an allocation of its own then: what a kernel does beyond its end is seen.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Step:
    """A command, what may be spent on it, and what came of it."""

    name: str
    status: str  # "ok", "failed", "cut off" or "skipped: why"
    seconds: float
    output: str

    @property
    def well(self) -> bool:
        return self.status == "ok" or self.status.startswith("skipped")


def why_not() -> str:
    """Why nothing can be run here; empty where it can."""
    if not torch.cuda.is_available():
        build = "a CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        return f"PyTorch {torch.__version__} ({build}) finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}, the kernels need sm_80"
    if not _ops.serves(torch.device("cuda")):
        return f"the extension has no CUDA kernels: {_ops.load_error or 'it was built without CUDA'}"
    return ""


def device_facts() -> dict[str, str]:
    """What a number has to be read beside."""
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "device": f"{properties.name}, sm_{properties.major}{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "wscl_fast": " · ".join(str(wscl_fast.build_info()).splitlines()),
    }
    query = "driver_version,clocks.max.sm,power.limit,clocks.sm"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    if shutil.which("nvidia-smi"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        facts[query.replace(",", ", ")] = done.stdout.strip() or done.stderr.strip()
    return facts


def run_step(
    name: str,
    command: Sequence[str],
    limit: float,
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Step:
    """Runs a command for at most so many seconds, with all that it starts; keeps the end of what it says."""
    if limit < 1:
        return Step(name, "skipped: the time was up", 0, "")
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "cut off"
    return Step(name, status, time.monotonic() - start, output)


def last_lines(text: str, count: int) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of one shape as a table of Markdown."""
    if not rows:
        return ["(none)"]
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join("" if r[n] is None else str(r[n]) for n in names) + " |" for r in rows]
    return lines


def write_report(
    path: Path, facts: dict[str, str], steps: Sequence[Step], results: Mapping[str, Any]
) -> None:
    """The report, moved into place when it is whole; results by the name of their step."""
    lines = ["# wscl_fast on a GPU", "", "Written by `make gpu`.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Steps", ""]
    lines += table([{"step": s.name, "result": s.status, "seconds": f"{s.seconds:.0f}"} for s in steps])
    for name, found in results.items():
        lines += ["", f"## {name.capitalize()}", "", *found["about"], "", *table(found["rows"])]
        lines += ["", *(f"- {reason}" for reason in found["left out"])]
    for step in steps:
        if step.output and not (step.name in results and step.well):
            kept = last_lines(step.output, 3 if step.well else 60)
            lines += ["", f"## {step.name}: {step.status}", "", "```", kept, "```"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def checks(limit: float) -> list[Step]:
    """The tests, and each tool of compute-sanitizer over a few problems of every operator, side by side."""
    program = shutil.which("compute-sanitizer")
    commands = {"tests (pytest -m gpu)": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20"]}
    if program is not None:
        sanitize = [program, "--error-exitcode", "1"]
        for tool in TOOLS:
            name = f"compute-sanitizer {tool}"
            commands[name] = [*sanitize, "--tool", tool, sys.executable, SANITIZED]
            if tool == "racecheck":
                commands[name].append("--short")
    # Each its share of the processors: threads that wait for each other would take all of the time. A script
    # of the tests imports this package, where it is not installed too.
    share = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(commands))),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }

    def one(name: str) -> Step:
        environment = share | (UNCACHED if SANITIZED in commands[name] else {})
        return run_step(name, commands[name], limit, environment=environment)

    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        tests, *sanitized = pool.map(one, commands)
    if program is None:
        sanitized = [Step("compute-sanitizer", "skipped: it is not on PATH", 0, "")]
    return [nothing_ran(tests), *sanitized]


def nothing_ran(step: Step) -> Step:
    """A pass of tests in which all were skipped is none."""
    if step.status == "ok" and not re.search(r"\d+ passed", step.output):
        return Step(step.name, "failed", step.seconds, step.output + "\nno test ran")
    return step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tests, sanitizer and benchmarks on this machine's GPU")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU to run on")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason:
        print(f"make gpu: {reason}; nothing was run", flush=True)
        return 2
    if options.check:
        return 0
    end = time.monotonic() + 60 * options.minutes - 10  # for the report itself

    def left() -> float:
        return end - time.monotonic()

    facts = device_facts()
    print(facts["device"], flush=True)
    steps = checks(0.65 * left())
    results: dict[str, Any] = {}
    for name, module in BENCHMARKS.items():
        results_file = options.out.with_name(f"{module}.json")
        results_file.unlink(missing_ok=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        share = max(0.0, left() - 30) * (0.7 if module == "bench_cuda" else 1.0)
        command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(results_file)]
        steps.append(run_step(name, [*command, "--budget", f"{share:.0f}"], left()))
        if results_file.exists():
            results[name] = json.loads(results_file.read_text())
    write_report(options.out, facts, steps, results)
    for step in steps:
        print(f"{step.name}: {step.status} ({step.seconds:.0f} s)", flush=True)
    print(f"report: {options.out}", flush=True)
    return 0 if all(step.well for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
