"""Clustered InfoNCE on the CPU: share of the peak, bare products beside it, memory, scaling, threads.

Usage: python -m benchmarks.bench_infonce [--full] [--only NAME] [--threads N] [--turns N]

Of each shape the passes are timed that users ask for: the loss alone, with gradients of the queries, of both
sides; in the batch; of both directions at once. Beside them run the bare logits by ``torch.mm`` and oneDNN.
``--only`` takes part of a name, as "float32 1024x65536" or "memory"; the other rows of the tables stay.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import (
    Timing,
    add_counts,
    check_only,
    interleave,
    keep,
    machine,
    peak_memory,
    save_figure,
    show,
    step,
    write_csv,
)
from benchmarks.peers import TEMPERATURE, naive
from wscl_fast import _C, _ops
from wscl_fast.functional import clustered_infonce
from wscl_fast.pairs import Pairs

Row = dict[str, object]
CLUSTERS = 150
QUEUE = 1 << 20
LONG_WORK = 1 << 37  # N · M · d of a case that is timed once above it: 2 seconds and more a GEMM
MOST_LOGITS = 1 << 27  # of a matrix that the naive loss may materialise


@dataclass(frozen=True)
class Pass:
    """What is asked for, and its cost in GEMMs (2 N M d flops): those done, and the fewest there can be."""

    name: str
    gradients: tuple[str, ...]
    gemms: float
    fewest: float


PASSES = [
    Pass("forward", (), 1, 1),
    Pass("forward + backward, keys detached", ("queries",), 2, 2),
]
# Weights are kept for the keys' gradient; those of halves are not, and all of them are made twice.
BOTH = Pass("forward + backward", ("queries", "keys"), 3, 3)
BOTH_OF_HALVES = Pass("forward + backward", ("queries", "keys"), 4, 3)
# Half of the symmetric matrix forward; backward what it weighs for rows and for columns, and where there is
# no room for the logits half of it again. Where there is for part of them they are counted as if for all.
IN_BATCH = [Pass("forward", (), 0.5, 0.5), Pass("forward + backward", ("queries",), 1.5, 1.5)]
TWO_WAY = [Pass("forward", (), 1, 1), Pass("forward + backward", ("queries", "keys"), 3, 3)]
NO_ROOM = {"in-batch": 2.0, "two-way": 4.0}


@dataclass(frozen=True)
class Case:
    """A shape in a dtype; ``kind`` says which loss."""

    n: int
    m: int
    d: int
    dtype: torch.dtype = torch.float32
    kind: str = "keys"  # "keys", "queue" (of keys that need no gradient), "in-batch", "two-way"

    @property
    def name(self) -> str:
        kind = "" if self.kind == "keys" else f" {self.kind}"
        return f"{str(self.dtype).removeprefix('torch.')} {self.n}x{self.m}x{self.d}{kind}"

    @property
    def passes(self) -> list[Pass]:
        both = BOTH if self.dtype == torch.float32 else BOTH_OF_HALVES
        by_kind = {"keys": [*PASSES, both], "queue": PASSES, "in-batch": IN_BATCH, "two-way": TWO_WAY}
        found = by_kind[self.kind]
        if self.kind in NO_ROOM:
            x, y = (torch.empty(rows, 1, dtype=self.dtype) for rows in (self.n, self.m))
            if not _ops.room.room_for_logits(x, None if self.kind == "in-batch" else y):
                forward, whole = found
                return [forward, replace(whole, gemms=NO_ROOM[self.kind])]
        return found

    def loss(self, **arguments: Any) -> Tensor:
        if self.kind == "two-way":
            scale = torch.tensor(1 / TEMPERATURE)
            rows, columns = _ops.two_way_logsumexp(Pairs(**arguments, own=None, scale=scale))
            return rows.mean() + columns.mean()
        return fused(**arguments)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def vectors(rows: int) -> Tensor:
            return normalize(torch.randn(rows, self.d, generator=generator), dim=1).to(self.dtype)

        def ids(rows: int) -> Tensor:
            return torch.randint(CLUSTERS, (rows,), generator=generator)

        if self.kind == "in-batch":
            return {"queries": vectors(self.n), "query_clusters": ids(self.n)}
        names = ("query_ids", "key_ids") if self.kind == "two-way" else ("query_clusters", "key_clusters")
        return {
            "queries": vectors(self.n),
            "keys": vectors(self.m),
            names[0]: ids(self.n),
            names[1]: ids(self.m),
        }


def cases() -> list[Case]:
    """Every shape in both dtypes."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for m in (4096, 65536, QUEUE):
            for n in (256, 1024, 4096):
                for d in (64, 128, 256, 768):
                    found.append(Case(n, m, d, dtype, "queue" if m == QUEUE else "keys"))
        found.append(Case(1024, 32768, 128, dtype))  # the project's first bar
        found += [Case(n, n, 128, dtype, "in-batch") for n in (1024, 4096, 16384)]
        found += [Case(n, n, 128, dtype, "two-way") for n in (1024, 4096)]
    return found


QUICK_WORK = 1 << 35  # N · M · d of a float32 case that is timed without --full, and the longest queue
QUICK = {  # of bfloat16
    "256x4096x128",
    "1024x4096x64",
    "1024x4096x256",
    "1024x32768x128",
    "1024x65536x128",
    "1024x4096x768",
    "4096x4096x128",
}


def is_quick(case: Case) -> bool:
    """Whether a case is timed without ``--full``."""
    if case.dtype != torch.float32:
        return f"{case.n}x{case.m}x{case.d}" in QUICK
    return case.n * case.m * case.d <= QUICK_WORK or (case.n, case.m, case.d) == (1024, QUEUE, 128)


def fused(**arguments: Any) -> Tensor:
    return clustered_infonce(**arguments, temperature=TEMPERATURE, impl="fused")


def onednn_mm(queries: Tensor, keys: Tensor) -> Tensor:
    """The bare logits by oneDNN, which PyTorch takes for halves, but not for float32."""
    if queries.dtype != torch.float32:
        return queries @ keys.T
    product: Tensor = torch.ops.mkldnn._linear_pointwise(queries, keys, None, "none", [], "")
    return product


def peak_of(dtype: torch.dtype) -> Callable[[int], float]:
    """Flops a second that products of a dtype can reach at most, measured now."""
    half = dtype == torch.bfloat16 and _C.bfloat16_dot_peak(1) > 0
    return _C.bfloat16_dot_peak if half else _C.multiply_add_peak


def steady_peak(times: dict[str, Timing], more: Sequence[float] = ()) -> float:
    """The upper quartile of a case's peaks: what disturbs a measurement of the peak can only lower it."""
    peaks = [*more, *(peak for time in times.values() for peak in time.peak)]
    return statistics.quantiles(peaks, n=4)[2]


def bench_case(case: Case, turns: int) -> list[Row]:
    arguments = case.inputs()
    queries, keys = arguments["queries"], arguments.get("keys", arguments["queries"])
    sides: dict[str, Callable[[], object]] = {
        p.name: step(case.loss, arguments, p.gradients) for p in case.passes
    }
    if case.m <= 65536:
        sides["torch.mm"] = lambda: queries @ keys.T
        sides["oneDNN"] = lambda: onednn_mm(queries, keys)
    comparable = case.kind in ("keys", "in-batch") and case.dtype == torch.float32 and case.d == 128
    if comparable and case.n * case.m <= MOST_LOGITS:
        for p in case.passes:
            if p.name != "forward + backward, keys detached":
                sides[f"naive {p.name}"] = step(naive, arguments, p.gradients)
    work = case.n * case.m * case.d
    long = work > LONG_WORK
    if work > 1 << 33:
        turns = min(turns, 1 if long else 5 if work <= 1 << 34 else 3)
    peak_now = peak_of(case.dtype)
    # One turn has too few peaks for a quartile of them.
    more = [peak_now(torch.get_num_threads()) for _ in range(9)] if long else []
    times = interleave(sides, turns=turns, peak=peak_now, warm=not long)
    rows: list[Row] = []
    peak = steady_peak(times, more)
    for p in case.passes:
        ours = times[p.name]

        def faster_than(rival: Timing | None, ours: Timing = ours) -> str:
            return f"{ours.times_faster_than(rival):.2f}" if rival else ""

        rows.append(
            {
                "case": case.name,
                "pass": p.name,
                "ms": f"{1e3 * ours.median:.2f}",
                "GFLOP/s": f"{2e-9 * work * p.gemms / ours.median:.0f}",
                "GEMMs": f"{p.gemms:g}",
                "peak GFLOP/s": f"{1e-9 * peak:.0f}",
                "share of peak": f"{2 * work * p.gemms / (ours.median * peak):.3f}",
                "in the fewest GEMMs": f"{2 * work * p.fewest / (ours.median * peak):.3f}",
                "least ms": f"{1e3 * min(ours.seconds):.2f}",
                "share, least": f"{2 * work * p.gemms / (min(ours.seconds) * peak):.3f}",
                "x torch.mm": faster_than(times.get("torch.mm")),
                "x oneDNN": faster_than(times.get("oneDNN")),
                "x naive": faster_than(times.get(f"naive {p.name}")),
            }
        )
    show(rows)
    return rows


def bench_threads(turns: int) -> list[Row]:
    """Two threads against one, in turns."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    for n, m, d, kind in (
        (256, 4096, 128, "keys"),
        (1024, 4096, 128, "keys"),
        (1024, 65536, 128, "keys"),
        (4096, 4096, 128, "in-batch"),
    ):
        case = Case(n, m, d, kind=kind)
        arguments = case.inputs()
        for p in (case.passes[0], case.passes[-1]):
            run = step(case.loss, arguments, p.gradients)

            def on(count: int, run: Callable[[], None] = run) -> None:
                torch.set_num_threads(count)
                run()
                torch.set_num_threads(threads)

            times = interleave(
                {str(count): lambda count=count: on(count) for count in (1, threads)},  # type: ignore[misc]
                turns=turns,
            )
            gain = times[str(threads)].times_faster_than(times["1"])
            rows.append({"case": case.name, "pass": p.name, f"{threads} threads over 1": f"{gain:.2f}"})
    show(rows)
    return rows


def bench_scaling(turns: int) -> list[Row]:
    """Time for each unit of N · M · d, over two decades of M at N = 1024, d = 128."""
    sides: dict[str, Callable[[], object]] = {}
    sizes = (4096, 16384, 65536, 409600)
    for m in sizes:
        case = Case(1024, m, 128)
        arguments = case.inputs()
        for p in case.passes[:2]:
            sides[f"{p.name} {m}"] = step(case.loss, arguments, p.gradients)
    times = interleave(sides, turns=turns)
    rows: list[Row] = []
    for p in PASSES[:2]:
        shares = {
            m: 2 * 1024 * m * 128 * p.gemms / (times[f"{p.name} {m}"].median * steady_peak(times))
            for m in sizes
        }
        rows += [
            {
                "M": m,
                "pass": p.name,
                "ms": f"{1e3 * times[f'{p.name} {m}'].median:.2f}",
                "share of peak": f"{shares[m]:.3f}",
                "time for a pair, M = 65536 is 1": f"{shares[65536] / shares[m]:.3f}",
            }
            for m in sizes
        ]
    show(rows)
    return rows


MEMORY = """
import torch
torch.set_num_threads({threads})
from benchmarks.bench_infonce import Case
from benchmarks.harness import step
small, case = Case(64, 64, {d}, {dtype}, {kind!r}), Case({n}, {m}, {d}, {dtype}, {kind!r})
gradients = case.passes[-1].gradients
step(small.loss, small.inputs(), gradients)()
arguments = case.inputs()
measured = step(case.loss, arguments, gradients)
"""


def bench_memory(threads: int) -> list[Row]:
    """MiB that a step with its gradients takes above its inputs and gradients, in a process of its own."""
    rows: list[Row] = []
    for case in (
        Case(256, 4096, 128),
        Case(1024, 65536, 128),
        Case(4096, 65536, 128),
        Case(4096, 65536, 128, torch.bfloat16),
        Case(1024, QUEUE, 128, kind="queue"),
        Case(1024, QUEUE, 128, torch.bfloat16, "queue"),
        Case(16384, 16384, 128, kind="in-batch"),
        Case(16384, 16384, 128, kind="two-way"),
    ):
        arguments = case.inputs()
        size = sum(arguments[name].nbytes for name in case.passes[-1].gradients) / 2**20
        del arguments
        fields = {"n": case.n, "m": case.m, "d": case.d, "dtype": case.dtype, "kind": case.kind}
        grown = peak_memory(MEMORY.format(**fields, threads=threads))
        rows.append(
            {
                "case": case.name,
                "MiB of the gradients": f"{size:.0f}",
                "MiB above inputs and gradients": f"{grown - size:.0f}",
                "MiB of one N x M matrix": f"{case.n * case.m * 4 / 2**20:.0f}",
            }
        )
    show(rows)
    return rows


def draw(rows: Sequence[Row]) -> None:
    """The share of the peak of every shape, a panel for each dtype and pass."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    dtypes, passes = ("float32", "bfloat16"), ("forward", "forward + backward")
    figure, grid = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    colours = {256: "#56B4E9", 1024: "#0072B2", 4096: "#D55E00"}
    markers = {4096: "o", 65536: "s", QUEUE: "^"}
    for i, dtype in enumerate(dtypes):
        for j, name in enumerate(passes):
            axis = grid[i][j]
            for row in rows:
                kind, shape, *rest = str(row["case"]).split()
                n, m, d = map(int, shape.split("x"))
                queue_too = rest == ["queue"] and row["pass"] == "forward"
                if kind != dtype or row["pass"] != name or m not in markers or not (rest == [] or queue_too):
                    continue
                label = f"N = {n}, M = {m}" if d == 128 else None
                share = float(str(row["share of peak"]))
                place = (64, 128, 256, 768).index(d)
                axis.plot(place, share, markers[m], color=colours[n], label=label, alpha=0.8)
            axis.axhline(0.85 - 0.05 * j if dtype == "float32" else 0.6, color="#999999", lw=0.8, ls="--")
            axis.set_title(f"{dtype}, {name}", fontsize=9, loc="left")
            axis.set_xticks(range(4), ["64", "128", "256", "768"])
            axis.set_ylim(0, 1.1)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(fontsize=7, ncols=2)
    figure.supxlabel("d", fontsize=9)
    figure.supylabel("share of the dtype's multiply-add peak, in the algorithm's GEMMs", fontsize=9)
    figure.suptitle(f"Clustered InfoNCE\n{machine()}", fontsize=9)
    save_figure(figure, "infonce")


def main() -> None:
    parser = argparse.ArgumentParser(description="Clustered InfoNCE on the CPU, against the machine")
    parser.add_argument("--full", action="store_true", help="all shapes (about 20 minutes on 2 cores, 7 GB)")
    parser.add_argument("--only", default="", help="what has this in its name; the tables' other rows stay")
    add_counts(parser, turns=7)
    options = parser.parse_args()
    everything = cases()
    extra = {"threads": bench_threads, "scaling": bench_scaling, "memory": bench_memory}
    check_only(parser, options.only, [*extra, *(case.name for case in everything)])
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    whole = options.full or options.only
    chosen = [c for c in everything if options.only in c.name and (whole or is_quick(c))]
    rows = [{**row, "machine": machine()} for case in chosen for row in bench_case(case, options.turns)]
    if rows:
        rows = keep("infonce", rows, [case.name for case in everything])
        write_csv("infonce", rows)
        draw(rows)
    for name, bench in extra.items():
        if options.only in name:
            found = bench(options.threads if name == "memory" else options.turns)
            write_csv(f"infonce_{name}", [{**row, "machine": machine()} for row in found])


if __name__ == "__main__":
    main()
