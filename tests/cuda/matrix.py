"""The whole matrix of simulated cases, several processes at a time, with a summary.

Usage: python tests/cuda/matrix.py [--workers N] [--seconds S] [--arch A] [--summary FILE]

Every kernel, dtype, architecture and shape: results against float64, races (between warps and between
CTAs), bounds, alignment, bytes that nobody wrote. Results are kept in ``build/simulated`` under a digest of
the sources: a run that was cut off, by ``--seconds`` too, goes on where it stopped, and only a finished one
writes the summary. No case is left out of it: a fault is counted, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUMMARY = ROOT / "docs" / "simulated.md"
FOLDER = ROOT / "build" / "simulated"


# Results that are kept apart, so that a change throws away no more than it has to, and the modules that
# decide them.
FAMILIES = {
    "infonce": ("test_infonce_simulated", "simulated_infonce"),
    "pairs": ("test_pairs_simulated", "simulated_pairs", "test_infonce_simulated"),
    "tags": ("test_tags_simulated", "test_infonce_simulated"),
    "kmeans": ("kmeans_cases", "simulated_kmeans"),
}


def family_of(which: str) -> str:
    """Of a pass."""
    return which if which in FAMILIES else "pairs"


def meaning(path: Path, name: str | None = None) -> bytes:
    """A Python module, or one class of it, without comments and docstrings."""
    tree: ast.AST = ast.parse(path.read_text())
    if name is not None:
        (tree,) = (x for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name == name)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree).encode()


@functools.cache
def digest(family: str) -> str:
    """Of everything that decides what its cases do: kernels, what runs them, what they are held to."""
    import simulator

    if family == "kmeans":
        kernels = [HERE / "kmeans_entry.cu", *(ROOT / "csrc" / "core").glob("kmeans*.cu")]
    else:
        kernels = [HERE / "entry.cu", *simulator.infonce_sources()]
    hashed = hashlib.sha256()
    for path in simulator.with_headers(kernels):
        hashed.update(path.name.encode() + path.read_bytes())
    for path in [HERE / f"{name}.py" for name in [*FAMILIES[family], "simulator"]]:
        hashed.update(path.name.encode() + meaning(path))
    hashed.update(meaning(ROOT / "wscl_fast" / "pairs.py", "Pairs"))
    hashed.update(meaning(ROOT / "wscl_fast" / "reference.py"))
    return hashed.hexdigest()[:16]


def every_case() -> dict[str, tuple[str, Any]]:
    """The pass and its case, by name."""
    import kmeans_cases
    import test_infonce_simulated
    import test_pairs_simulated
    import test_tags_simulated

    found = {f"infonce-{case}": ("infonce", case) for case in test_infonce_simulated.every_case()}
    for name in test_pairs_simulated.PASSES:
        found |= {f"{name}-{case}": (name, case) for case in test_pairs_simulated.every_case()}
    found |= {f"tags-{case}": ("tags", case) for case in test_tags_simulated.every_case()}
    return found | {f"kmeans-{case}": ("kmeans", case) for case in kmeans_cases.every_case()}


def simulate(which: str, case: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Deviations from float64, and the launches."""
    import kmeans_cases
    import simulated_kmeans
    import test_infonce_simulated
    import test_pairs_simulated
    import test_tags_simulated

    if which == "infonce":
        results = test_infonce_simulated.simulate(case)
        return test_infonce_simulated.deviations(case, results), results.launches
    if which == "tags":
        got = test_tags_simulated.run(case)
        return test_tags_simulated.deviations(case, got), got.launches
    if which == "kmeans":
        x, centroids = kmeans_cases.arguments(case)
        update = case.top == 1
        found = simulated_kmeans.run(
            x, centroids, cosine=case.cosine, top=case.top, update=update, arch=case.arch
        )
        if update:
            kmeans_cases.check_update(x, centroids, case.cosine, found, None)
        else:
            kmeans_cases.check(x, centroids, case.cosine, found)
        return {}, found.launches
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
    start = time.process_time()
    try:
        found, launches = simulate(which, case)
    except Exception as error:  # whatever it is, it is that case's result
        return {**result, "fault": f"{type(error).__name__}: {error}", "seconds": time.process_time() - start}
    kernels = collections.Counter(floor.kernel_name(r) for r in launches)
    wrong = {n: dataclasses.asdict(d) for n, d in found.items() if not d.error <= d.most}
    return {
        **result,
        "fault": f"inexact: {wrong}" if wrong else None,
        "kernels": dict(kernels),
        "share": max((d.error / d.most for d in found.values()), default=0.0),
        "ratio": {n: d.error / d.plain for n, d in found.items() if d.plain > 0},
        "seconds": time.process_time() - start,
    }


def work(names: list[str], taken: Any, until: float) -> None:
    """Takes cases until none is left."""
    torch.set_num_threads(1)
    cases = every_case()
    while time.monotonic() < until:
        with taken:
            at, taken.value = taken.value, taken.value + 1
        if at >= len(names):
            return
        which, case = cases[names[at]]
        result = run_case(names[at], which, case)
        path = FOLDER / f"{family_of(which)}-{digest(family_of(which))}" / f"{os.getpid()}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def compile_for(kmeans: bool, arch: str) -> float:
    """The library of one architecture, into the simulator's cache; seconds."""
    import simulated_kmeans
    import simulator

    start = time.monotonic()
    (simulated_kmeans if kmeans else simulator).library(arch)
    return time.monotonic() - start


def kept() -> dict[str, dict[str, Any]]:
    """Results so far, by case; a line that was cut off does not count."""
    found = {}
    for family in FAMILIES:
        for path in (FOLDER / f"{family}-{digest(family)}").glob("*.jsonl"):
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


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The text of the summary."""
    faults = [r for r in results.values() if r["fault"]]
    seconds = sum(r["seconds"] for r in results.values())
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
        worst = f"{max(shares):.2f}" if ratios else ""
        rows.append([which, dtype, f"sm_{arch}", len(found), bad, worst, middle])
    counted = [["kernel", *(f"sm_{arch}, launches" for arch in archs)]]
    names = sorted({name for name, _ in kernels})
    counted += [[f"`{name}`", *(str(kernels[name, arch]) for arch in archs)] for name in names]
    lines = [
        "# The CUDA kernels in the simulator",
        "",
        "Written by `make simulate` (`tests/cuda/matrix.py`): PTX that nvcc emits for each architecture, run",
        "by ptxsim on a CPU. Nothing here was run on a GPU, and no number is a time of one.",
        "",
        f"**{len(results)} cases, {len(faults)} faults**; {seconds / 60:.0f} minutes of one core.",
        f"Digests of what decides them: {', '.join(f'{family} {digest(family)}' for family in FAMILIES)}.",
        "",
        "Each case runs forward and backward. N is 1, 63, 64, 65, 127, 128, 129, 300 and d is 8, 40, 64, 96,",
        "128, 200, 256, 768; every M of those values of N comes beside every N and every d, and the batch",
        'itself as keys beside all; positives "out" and "in"; ignored ids and own keys among them. On in all',
        "of them: races between warps and between CTAs, copies still on their way, bounds, alignment, bytes",
        "of shared and global memory that nobody wrote, barriers. The passes over pairs (log-sum-exp, the",
        "two-way one, sums of softplus) take all keys, those of a row's own id or of others in turn;",
        "sums weighed by tags take both kinds of weight.",
        "",
        "K-means assigns and sums up: N is 1, 31, 128, 129, 300, K is 1, 2, 63, 64, 65, 129, 300, d is 1 to",
        "700, both metrics; among them ties, duplicates, points far from the origin, tiny and huge ones, and",
        "the nearest 2, 5 and 8 centroids. Assignments have to be those of float64.",
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
    import simulator

    parser = argparse.ArgumentParser(description="The whole matrix of simulated cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds", type=float, default=3600, help="stop after so long; the next run goes on"
    )
    parser.add_argument("--arch", action="append", help="only this one (80, 90, 100); may be repeated")
    parser.add_argument("--only", action="append", choices=FAMILIES, help="may be repeated")
    parser.add_argument("--summary", type=Path, default=SUMMARY)
    options = parser.parse_args()
    if reason := simulator.why_not():  # a worker that skips would be started anew, again and again
        parser.exit(1, f"wscl_fast: {reason}\n")
    os.environ["PTXSIM_THREADS"] = "1"  # a process for each core does better
    os.environ["PTXSIM_QUIET"] = "1"
    torch.set_num_threads(1)
    cases = {
        name: (which, case)
        for name, (which, case) in every_case().items()
        if case.arch in (options.arch or [case.arch]) and family_of(which) in (options.only or FAMILIES)
    }
    for family in FAMILIES:
        (FOLDER / f"{family}-{digest(family)}").mkdir(parents=True, exist_ok=True)
    libraries = {(family_of(which) == "kmeans", case.arch) for which, case in cases.values()}
    fork = multiprocessing.get_context("fork")  # processes keep the command's name
    with fork.Pool(options.workers) as pool:
        times = pool.starmap(compile_for, sorted(libraries), chunksize=1)
    print(f"compiled in {sum(times):.0f} s", flush=True)
    done = kept()
    left = [name for name in cases if name not in done]
    random.Random(0).shuffle(left)  # so that a part of them tells how long all will take
    until = time.monotonic() + options.seconds
    taken = fork.Value("q", 0)
    shares = [fork.Process(target=work, args=(left, taken, until)) for _ in range(options.workers)]
    for process in shares:
        process.start()
    for process in shares:
        process.join()
    results = {name: r for name, r in kept().items() if name in cases}
    faults = [r for r in results.values() if r["fault"]]
    seconds = sum(r["seconds"] for r in results.values())
    print(
        f"{len(results)} of {len(cases)} cases, {len(faults)} faults, {seconds:.0f} s of a core", flush=True
    )
    for r in faults[:20]:
        print(f"  {r['case']}: {r['fault'].splitlines()[0]}", flush=True)
    if len(results) == len(cases) and not options.arch and not options.only:
        part = options.summary.with_suffix(".part")
        part.write_text(summary(results))
        part.replace(options.summary)
        print(f"summary: {options.summary}", flush=True)
    died = any(process.exitcode for process in shares)
    return 1 if faults or died else 0 if len(results) == len(cases) else 3


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    sys.exit(main())
