"""The whole matrix of simulated cases, several processes at a time, with a summary.

Usage: python tests/cuda/matrix.py [--workers N] [--seconds S] [--arch A] [--summary FILE]

Every kernel, dtype, architecture and shape: results against float64, races (between warps and between
CTAs), bounds, alignment, bytes that nobody wrote. Results are kept in ``build/simulated`` under a digest of
the sources: a run that was cut off, by ``--seconds`` too, goes on where it stopped, and only a finished one
writes the summary. No case is left out of it: a fault is counted, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUMMARY = ROOT / "docs" / "simulated.md"


def digest() -> str:
    """Of everything that decides what a case does."""
    found = [*(ROOT / "csrc" / "core").glob("*"), *HERE.glob("*.cu"), *HERE.glob("simulated_*.py")]
    found += [HERE / "simulator.py", HERE / "test_infonce_simulated.py", ROOT / "wscl_fast" / "reference.py"]
    hashed = hashlib.sha256()
    for path in sorted(found):
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def every_case() -> dict[str, tuple[str, Any]]:
    """The pass and its case, by name."""
    import test_infonce_simulated
    import test_pairs_simulated

    found = {f"infonce-{case}": ("infonce", case) for case in test_infonce_simulated.every_case()}
    for name in test_pairs_simulated.PASSES:
        found |= {f"{name}-{case}": (name, case) for case in test_pairs_simulated.every_case()}
    return found


def simulate(which: str, case: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Deviations from float64, and the launches."""
    import test_infonce_simulated
    import test_pairs_simulated

    if which == "infonce":
        results = test_infonce_simulated.simulate(case)
        return test_infonce_simulated.deviations(case, results), results.launches
    torch.manual_seed(0)
    outcome = test_pairs_simulated.PASSES[which](case)
    return test_pairs_simulated.deviations(case, outcome), outcome.launches


def run_case(name: str, which: str, case: Any) -> dict[str, Any]:
    """What came out, as it is kept."""
    import floor
    import simulator

    dtype = str(case.dtype)[6:] + "*" * getattr(case, "fast", False)
    result: dict[str, Any] = {"case": name, "pass": which, "arch": case.arch, "dtype": dtype}
    simulator.ptxsim().reset()
    try:
        found, launches = simulate(which, case)
    except Exception as error:  # whatever it is, it is that case's result
        return {**result, "fault": f"{type(error).__name__}: {error}"}
    kernels = collections.Counter(floor.kernel_name(r) for r in launches)
    wrong = {n: dataclasses.asdict(d) for n, d in found.items() if not d.error <= d.most}
    return {
        **result,
        "fault": f"inexact: {wrong}" if wrong else None,
        "kernels": dict(kernels),
        "share": max((d.error / d.most for d in found.values()), default=0.0),
        "ratio": {n: d.error / d.plain for n, d in found.items() if d.plain > 0},
    }


def work(names: list[str], folder: Path, worker: int, workers: int, until: float) -> None:
    """A process's share of the cases: every so-manieth."""
    torch.set_num_threads(1)
    cases = every_case()
    with (folder / f"{os.getpid()}.jsonl").open("a") as file:
        for name in names[worker::workers]:
            if time.monotonic() > until:
                return
            file.write(json.dumps(run_case(name, *cases[name])) + "\n")
            file.flush()


def compile_for(arch: str) -> None:
    """The library of one architecture, into the simulator's cache."""
    import simulator

    simulator.library(arch)


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """Results so far, by case; a line that was cut off does not count."""
    found = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[result["case"]] = result
    return found


def table(rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """A table of Markdown, the first row its head."""
    for at, row in enumerate(rows):
        cells = [str(cell) for cell in row]
        yield f"| {' | '.join(cells)} |"
        if at == 0:
            yield "|:---|" + "---:|" * (len(cells) - 1)


def summary(results: dict[str, dict[str, Any]], seconds: float, workers: int) -> str:
    """The text of the summary."""
    faults = [r for r in results.values() if r["fault"]]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    kernels: dict[tuple[str, str], int] = collections.Counter()
    for r in results.values():
        groups[r["pass"], r["dtype"], r["arch"]].append(r)
        for kernel, times in r.get("kernels", {}).items():
            kernels[kernel, r["arch"]] += times
    archs = sorted({arch for *_, arch in groups}, key=int)
    rows: list[list[object]] = [
        [
            "pass",
            "dtype",
            "PTX of",
            "cases",
            "faults",
            "worst share of the allowed error",
            "median error / PyTorch's",
        ]
    ]
    for (which, dtype, arch), found in sorted(
        groups.items(), key=lambda item: (*item[0][:2], int(item[0][2]))
    ):
        shares = [r["share"] for r in found if "share" in r]
        ratios = sorted(x for r in found for x in r.get("ratio", {}).values())
        middle = f"{ratios[len(ratios) // 2]:.2f}" if ratios else ""
        bad = sum(bool(r["fault"]) for r in found)
        rows.append([which, dtype, f"sm_{arch}", len(found), bad, f"{max(shares, default=0):.2f}", middle])
    counted = [["kernel", *(f"sm_{arch}, launches" for arch in archs)]]
    names = sorted({name for name, _ in kernels})
    counted += [[f"`{name}`", *(str(kernels[name, arch]) for arch in archs)] for name in names]
    lines = [
        "# The CUDA kernels in the simulator",
        "",
        "Written by `make simulate` (`tests/cuda/matrix.py`): PTX that nvcc emits for each architecture, run",
        "by ptxsim on a CPU. Nothing here was run on a GPU, and no number is a time of one.",
        "",
        f"**{len(results)} cases, {len(faults)} faults**; {seconds / 60:.0f} minutes of {workers} processes.",
        f"Sources: {digest()}.",
        "",
        "Each case runs forward and backward. N is 1, 63, 64, 65, 127, 128, 129, 300 and d is 8, 40, 64, 96,",
        "128, 200, 256, 768; every M of those values of N comes beside every N and every d, and the batch",
        'itself as keys beside all; positives "out" and "in"; ignored ids and own keys among them. On in all',
        "of them: races between warps and between CTAs, copies still on their way, bounds, alignment, bytes",
        "of shared and global memory that nobody wrote, barriers. The passes over pairs (log-sum-exp, the",
        "two-way one, sums of softplus) take all keys, those of a row's own id or of others in turn.",
        "",
        *table(rows),
        "",
        "The allowed error of a result is plain PyTorch's own at that dtype, against float64, plus a",
        "rounding of that dtype. float32* takes three products of bfloat16 terms, not six, where TF32 is",
        "allowed.",
        "",
        *table(counted),
        "",
    ]
    lines += [f"- **{r['case']}**: {r['fault'].splitlines()[0]}" for r in faults[:50]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole matrix of simulated cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds", type=float, default=3600, help="stop after so long; the next run goes on"
    )
    parser.add_argument("--arch", action="append", help="only this one (80, 90, 100); may be repeated")
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    options = parser.parse_args()
    os.environ["PTXSIM_THREADS"] = "1"  # a process for each core does better
    os.environ["PTXSIM_QUIET"] = "1"
    start = time.monotonic()
    folder = ROOT / "build" / "simulated" / digest()
    folder.mkdir(parents=True, exist_ok=True)
    spent = folder / "seconds"
    before = float(spent.read_text()) if spent.exists() else 0.0
    cases = {n: c for n, (_, c) in every_case().items() if not options.arch or c.arch in options.arch}
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(options.workers) as pool:
        pool.map(compile_for, sorted({case.arch for case in cases.values()}), chunksize=1)
    left = [name for name in cases if name not in kept(folder)]
    until = time.monotonic() + options.seconds  # what is compiled is compiled once
    shares = [
        spawn.Process(target=work, args=(left, folder, i, options.workers, until))
        for i in range(options.workers)
    ]
    for process in shares:
        process.start()
    for process in shares:
        process.join()
    results = {name: r for name, r in kept(folder).items() if name in cases}
    seconds = before + time.monotonic() - start
    spent.write_text(f"{seconds:.1f}")
    faults = [r for r in results.values() if r["fault"]]
    print(f"{len(results)} of {len(cases)} cases, {len(faults)} faults, {seconds:.0f} s", flush=True)
    for r in faults[:20]:
        print(f"  {r['case']}: {r['fault'].splitlines()[0]}", flush=True)
    if len(results) == len(cases) and not options.arch:
        part = options.summary.with_suffix(".part")
        part.write_text(summary(results, seconds, options.workers))
        part.replace(options.summary)
        print(f"summary: {options.summary}", flush=True)
    died = any(process.exitcode for process in shares)
    return 1 if faults or died else 0 if len(results) == len(cases) else 3


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    sys.exit(main())
