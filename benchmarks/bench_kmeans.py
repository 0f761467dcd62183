"""K-means on the CPU beside scikit-learn, faiss, scikit-learn-intelex, fast_pytorch_kmeans and plain PyTorch.

Usage: .venv-peers/bin/python -m benchmarks.bench_kmeans [--only TASK …] [--cases A B C] [--turns N]

Tasks, each with a table of its own in results/, whose other rows stay:

    iteration  assign and update once, from the same centroids (scikit-learn-intelex: those of the iteration
               after it too); the bare product of the distances beside it
    fit        25 iterations from the same start, with bounds
    seeding    k-means++
    scalable   k-means|| and bisecting for a large K: time, and memory above the input
    memory     of an iteration and of a fit, above the input
    scaling    an iteration at twice and four times the samples and the clusters
    largest    100M samples in a file, and a million clusters: memory above the input (15 minutes, 13 GB of
               disk where temporary files go; by --only alone)

Every peer runs in a process of its own with the settings it is fastest with (peers_kmeans.py); turns
alternate.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from benchmarks.bench_infonce import peak_of
from benchmarks.elsewhere import Elsewhere
from benchmarks.harness import (
    RESULTS,
    Timing,
    add_counts,
    interleave,
    machine,
    peak_memory,
    save_figure,
    show,
    write_csv,
)
from benchmarks.peers_kmeans import CASES, FIT_ITERATIONS, PEERS_OF, Case, environment, inertia
from wscl_fast import KMeans, _ops
from wscl_fast.clustering.inits import plus_plus
from wscl_fast.clustering.points import Points

OURS = "wscl_fast"
Row = dict[str, object]
Sides = dict[str, Callable[[], object]]


def peers(task: str, case: Case, threads: int) -> dict[str, Elsewhere]:
    """Those that are installed; the missing ones are told of."""
    found = {}
    for name in PEERS_OF[task]:
        try:
            found[name] = Elsewhere(
                "benchmarks.peers_kmeans", [name, task, case.name, str(threads)], environment(name, threads)
            )
        except ImportError as error:
            print(f"{name}: left out ({error})", flush=True)
    return found


def compared(task: str, case: Case, sides: Sides, threads: int, turns: int, **settings: Any) -> list[Row]:
    """Ours and others' times, and by how much each is faster than the best peer in the same turn, if any."""
    others = peers(task, case, threads)
    try:
        times = interleave({**sides, **others}, turns=turns, **settings)
        values = {name: side.result for name, side in others.items()}
    finally:
        for side in others.values():
            side.close()
    best = min(others, key=lambda name: times[name].median, default=None)
    flops = 2 * case.n * case.k * case.d
    rows: list[Row] = []
    for name, time in times.items():
        row: Row = {"case": case.name, "N": case.n, "d": case.d, "K": case.k, "side": name}
        row["ms"] = f"{1e3 * time.median:.2f}"
        row["best ms"] = f"{1e3 * min(time.seconds):.2f}"
        if task == "iteration":
            row["share of peak"] = f"{time.share(flops):.3f}"
        row |= dict.fromkeys(("x best peer", "x best peer, least times", "best peer"), "")
        if best is not None:
            row["x best peer"] = f"{time.times_faster_than(times[best]):.2f}"
            row["x best peer, least times"] = f"{min(times[best].seconds) / min(time.seconds):.2f}"
            row["best peer"] = best
        if task == "fit":
            row["inertia"] = values.get(name, "")
        rows.append(row)
    return rows


def iteration(case: Case, threads: int, turns: int) -> list[Row]:
    x = case.samples()
    centroids = case.centroids(x)

    def update(candidates: _ops.Candidates) -> tuple[Tensor, ...]:
        return _ops.kmeans_update(x, centroids, weights=None, cosine=False, candidates=candidates)

    def plain() -> None:
        scores = torch.addmm(centroids.square().sum(dim=1), x, centroids.T, alpha=-2)
        torch.zeros_like(centroids).index_add_(0, scores.argmin(dim=1), x)

    sides: Sides = {f"{OURS}, float32 product": lambda: update("full")}
    if _has_bfloat16():
        same = torch.equal(update("full")[0], update("bfloat16")[0])
        if not same:
            raise AssertionError(f"{case.name}: candidates in bfloat16 gave other assignments")
        sides[f"{OURS}, bfloat16 candidates"] = lambda: update("bfloat16")
    sides["torch: addmm, argmin, index_add"] = plain
    sides["torch.mm alone"] = lambda: x @ centroids.T
    # A share of the peak is that of the instruction in use.
    peaks = {f"{OURS}, bfloat16 candidates": peak_of(torch.bfloat16)}
    return compared("iteration", case, sides, threads, turns, peaks=peaks)


def _has_bfloat16() -> bool:
    return _ops.extension is not None and bool(_ops.extension.has_bfloat16_candidates())


def fit(case: Case, threads: int, turns: int) -> list[Row]:
    x = case.samples()
    start, found = case.start(x), {}

    def run(algorithm: str) -> None:
        model = KMeans(case.k, init=start, max_iter=FIT_ITERATIONS, tol=0, algorithm=algorithm).fit(x)
        found[algorithm] = model.cluster_centers_

    names = {"auto": OURS, "lloyd": f"{OURS}, without bounds"}
    sides: Sides = {name: lambda algorithm=algorithm: run(algorithm) for algorithm, name in names.items()}
    rows = compared("fit", case, sides, threads, turns, warm=False)
    for row in rows:
        for algorithm, name in names.items():
            if row["side"] == name:
                row["inertia"] = inertia(x, found[algorithm])
    return rows


def seeding(case: Case, threads: int, turns: int) -> list[Row]:
    x = case.samples()
    sides: Sides = {OURS: lambda: plus_plus(Points(x), case.k, torch.Generator().manual_seed(0))}
    return compared("seeding", case, sides, threads, turns, warm=False)


SCALABLE = """
import time, torch
from benchmarks.peers_kmeans import Case
from wscl_fast.clustering import BisectingKMeans
from wscl_fast.clustering.inits import scalable
from wscl_fast.clustering.points import Points
torch.set_num_threads({threads})
x = Case("", {n}, {d}, 1000).samples()
def start(x, k):
    return scalable(Points(x), k, torch.Generator().manual_seed(0))
def splits(x, k):
    return BisectingKMeans(k).fit(x).cluster_centers_
{what}(x[:2000], 10)
def measured():
    begin = time.perf_counter()
    found = {what}(x, {k})
    assert found.shape == ({k}, {d})
    print(f"{name}: {{time.perf_counter() - begin:.1f}} s")
"""
_MANY = {"k-means||": "start", "BisectingKMeans": "splits"}


def scalable(threads: int) -> list[Row]:
    n, d, k = 200_000, 64, 100_000
    rows: list[Row] = []
    for name, what in _MANY.items():
        mib = peak_memory(SCALABLE.format(n=n, d=d, k=k, threads=threads, name=name, what=what), timed=True)
        rows.append(
            {
                "case": name,
                "N": n,
                "d": d,
                "K": k,
                "MiB above the input": f"{mib:.0f}",
                "MiB of the centroids": f"{k * d * 4 / 2**20:.0f}",
                "MiB of an N x K matrix": f"{n * k * 4 / 2**20:.0f}",
            }
        )
    return rows


ROWS, WIDTH, PART = 100_000_000, 64, 1 << 20  # halves: 12 GiB
FILE = """
import time, torch
from wscl_fast import KMeans
from wscl_fast.clustering import FeatureFiles
torch.set_num_threads({threads})
def fit(samples):
    return KMeans(100, init="random", n_init=1, random_state=0, max_iter=2, tol=0).fit(samples)
fit(torch.randn(3000, {d}).half())
def measured():
    begin = time.perf_counter()
    model = fit(FeatureFiles({path!r}))
    assert len(model.labels_) == {n} == int(model.counts_.sum())
    print(f"two iterations: {{time.perf_counter() - begin:.0f}} s, inertia {{model.inertia_history_}}")
"""


def write_samples(path: Path) -> None:
    """Noise around 1000 middles, in halves."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(1000, WIDTH, generator=generator)
    out = open_memmap(path, mode="w+", dtype=np.float16, shape=(ROWS, WIDTH))
    for start in range(0, ROWS, PART):
        n = min(PART, ROWS - start)
        near = middles[torch.randint(0, 1000, (n,), generator=generator)]
        out[start : start + n] = near.add_(torch.randn(n, WIDTH, generator=generator)).half().numpy()


def largest(threads: int) -> list[Row]:
    """100M samples of which the blocks at hand are in memory; a million clusters of two million samples."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npy"
        write_samples(path)
        of_file = peak_memory(FILE.format(path=str(path), n=ROWS, d=WIDTH, threads=threads), timed=True)
    n, k = 2_000_000, 1_000_000
    fields = {"n": n, "d": WIDTH, "k": k, "threads": threads}
    name = "BisectingKMeans"
    split = peak_memory(SCALABLE.format(**fields, name=name, what=_MANY[name]), timed=True)
    return [
        {"case": "KMeans, a file", "N": ROWS, "d": WIDTH, "K": 100, "MiB above the input": f"{of_file:.0f}"},
        {"case": name, "N": n, "d": WIDTH, "K": k, "MiB above the input": f"{split:.0f}"},
    ]


MEMORY = """
import torch
from benchmarks.peers_kmeans import CASES
from wscl_fast import KMeans
from wscl_fast.functional import kmeans_update
torch.set_num_threads({threads})
case = CASES[{name!r}]
x = case.samples()
start = case.start(x)
kmeans_update(x[:3000], start[:9])
KMeans(9, init=start[:9], max_iter=1).fit(x[:3000])
def measured():
    {what}
"""
_RUNS = {
    "iteration": "kmeans_update(x, start)",
    "fit": "KMeans(case.k, init=start, max_iter=6, tol=0, algorithm='hamerly').fit(x)",
}


def _peak(case: Case, run: str, threads: int) -> float:
    return peak_memory(MEMORY.format(name=case.name, what=run, threads=threads))


def memory(case: Case, threads: int) -> list[Row]:
    return [
        {
            "case": case.name,
            "what": what,
            "MiB above the input": f"{_peak(case, run, threads):.0f}",
            "MiB of the centroids": f"{case.k * case.d * 4 / 2**20:.1f}",
            "MiB of an N x K matrix": f"{case.n * case.k * 4 / 2**20:.0f}",
        }
        for what, run in _RUNS.items()
    ]


def scaling(turns: int) -> list[Row]:
    """Time for each sample and centroid, beside that of the smallest."""
    base = Case("", 50_000, 128, 500)
    cases = [base, *(replace(base, n=base.n * t) for t in (2, 4))]
    cases += [replace(base, k=base.k * t) for t in (2, 4)]
    sides: Sides = {}
    for case in cases:
        x = case.samples()
        centroids = case.start(x)
        sides[f"{case.n} x {case.k}"] = lambda x=x, c=centroids: _ops.kmeans_update(
            x, c, weights=None, cosine=False, candidates="full"
        )
    times = interleave(sides, turns=turns)
    first = next(iter(times.values()))

    def relative(time: Timing, case: Case) -> float:
        return 1 / time.times_faster_than(first) / (case.n * case.k / (base.n * base.k))

    return [
        {
            "case": name,
            "N": case.n,
            "K": case.k,
            "ms": f"{1e3 * time.median:.2f}",
            "time a pair, of the first's": f"{relative(time, case):.3f}",
        }
        for (name, time), case in zip(times.items(), cases, strict=True)
    ]


def keep(task: str, rows: list[Row]) -> list[Row]:
    """The new rows with those of the table's other cases, written; returns all."""
    path = RESULTS / f"kmeans_{task}.csv"
    new = {row["case"] for row in rows}
    rows = [{**row, "machine": machine()} for row in rows]
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if row["case"] not in new]
        if all(row.keys() == rows[0].keys() for row in old):
            rows = sorted([*old, *rows], key=lambda row: str(row["case"])) if task != "scaling" else rows
    write_csv(path.stem, rows)
    return rows


def draw() -> None:
    """A bar for every side of an iteration, a fit and the seeding, from the tables as they are."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[tuple[str, dict[str, float]]] = []
    for task, title in (("iteration", "assign and update once"), ("fit", "a fit"), ("seeding", "k-means++")):
        path = RESULTS / f"kmeans_{task}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if row["case"] == name]
            shape = f"N = {mine[0]['N']}, d = {mine[0]['d']}, K = {mine[0]['K']}"
            panels.append((f"{title}: {shape}", {row["side"]: float(row["ms"]) for row in mine}))
    if not panels:
        return
    figure, grid = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(12, 0.6 + 1.9 * -(-len(panels) // 2)), squeeze=False
    )
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, times) in zip(grid.flat, panels, strict=False):
        names = list(times)[::-1]
        colours = ["#D55E00" if name.startswith(OURS) else "#999999" for name in names]
        bars = axis.barh(names, [times[name] for name in names], color=colours)
        axis.bar_label(bars, [f" {times[name]:,.1f} ms" for name in names], fontsize=8)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_title(title, fontsize=9, loc="left")
    figure.suptitle(f"k-means, float32, medians of interleaved turns\n{machine()}", fontsize=9)
    save_figure(figure, "kmeans")


TASKS = ("iteration", "fit", "seeding", "scalable", "memory", "scaling")
LONG = ("largest",)


def main() -> None:
    parser = argparse.ArgumentParser(description="k-means beside its peers, on the CPU")
    parser.add_argument(
        "--only", nargs="+", choices=TASKS + LONG, default=list(TASKS), help="default: all but largest"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    add_counts(parser, turns=None, said="7; a fit: 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(), end="\n\n", flush=True)
    cases, turns = [CASES[name] for name in options.cases], options.turns
    for task in options.only:
        rows: list[Row] = []
        for case in cases:
            if task == "iteration":
                rows += iteration(case, options.threads, turns or (4 if case.name == "C" else 7))
            elif task == "fit" and case.name != "C":  # half a minute for each peer
                rows += fit(case, options.threads, turns or (3 if case.name == "B" else 1))
            elif task == "seeding" and case.name == "A":
                rows += seeding(case, options.threads, turns or 1)
            elif task == "memory":
                rows += memory(case, options.threads)
        if task == "scalable":
            rows = scalable(options.threads)
        elif task == "scaling":
            rows = scaling(turns or 7)
        elif task == "largest":
            rows = largest(options.threads)
        if rows:
            show(rows)
            print(flush=True)
            keep(task, rows)
    draw()


if __name__ == "__main__":
    main()
