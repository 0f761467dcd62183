"""Clustered InfoNCE beside what users would pick instead: time of a step, and memory.

Usage: .venv-peers/bin/python -m benchmarks.peers_infonce [--threads N] [--turns N] [--only NAME]

The same loss by everybody, which is checked before anything is timed: naive PyTorch, the same through
torch.compile, pytorch-metric-learning's SupConLoss and NTXentLoss, lightly's NTXentLoss. Vectors have length
1 already, and only lightly divides by it again. Beside them runs ``torch.mm`` of the bare logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import peers
from benchmarks.harness import (
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
from wscl_fast.functional import clustered_infonce

CLUSTERS = 150
OURS, MM = "wscl_fast", "torch.mm"
Loss = Callable[..., Tensor]
# What wants a gradient, by the name of the pass.
PASSES = {"forward": (), "queries": ("queries",), "both": ("queries", "keys")}


@dataclass(frozen=True)
class Case:
    """A shape; ``m=None`` is the batch itself, two views of each sample."""

    n: int
    m: int | None
    d: int
    labels: bool = True  # cluster ids; else the other view is the only positive (NT-Xent)
    rivals: tuple[str, ...] = ("naive", "compiled naive", "SupConLoss")

    @property
    def name(self) -> str:
        kind = "" if self.labels else " NT-Xent"
        return f"{self.n} x {self.m or self.n} x {self.d}" + (" in-batch" * (self.m is None)) + kind

    @property
    def passes(self) -> Sequence[str]:
        return ("forward", "queries", "both") if self.m is not None else ("forward", "both")


CASES = [
    Case(1024, 65536, 128),
    Case(1024, 8192, 128),
    Case(256, 4096, 128),
    Case(1024, 8192, 768),
    Case(4096, None, 128),
    Case(
        4096, None, 128, labels=False, rivals=("naive", "compiled naive", "SupConLoss", "lightly NTXentLoss")
    ),
    # pytorch-metric-learning's NTXentLoss has a row for every positive and a column for every negative pair.
    Case(256, None, 128, labels=False, rivals=("naive", "lightly NTXentLoss", "NTXentLoss")),
]


def inputs(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def vectors(rows: int) -> Tensor:
        return normalize(torch.randn(rows, case.d, generator=generator), dim=1)

    def ids(rows: int) -> Tensor:
        return torch.randint(CLUSTERS, (rows,), generator=generator)

    if case.m is not None:
        return {
            "queries": vectors(case.n),
            "keys": vectors(case.m),
            "query_clusters": ids(case.n),
            "key_clusters": ids(case.m),
        }
    clusters = ids(case.n // 2) if case.labels else torch.arange(case.n // 2)
    return {"queries": vectors(case.n), "query_clusters": clusters.repeat(2)}


def ours(**arguments: Any) -> Tensor:
    return clustered_infonce(**arguments, temperature=peers.TEMPERATURE, impl="fused")


def bare_logits(queries: Tensor, keys: Tensor | None = None, **_: Tensor) -> Tensor:
    return queries @ (queries if keys is None else keys).T


def lightly(queries: Tensor, *, query_clusters: Tensor) -> Tensor:
    """The two views are the halves of the batch."""
    loss: Tensor = _lightly(*queries.chunk(2))
    return loss


_lightly: Any = None


def losses(case: Case) -> dict[str, Loss]:
    """Ours and those rivals that are installed; the missing ones are told of."""
    global _lightly
    found: dict[str, Loss] = {OURS: ours}
    for name in case.rivals:
        try:
            if name == "naive":
                found[name] = peers.naive
            elif name == "compiled naive":
                found[name] = peers.compiled_naive()
            elif name == "lightly NTXentLoss":
                _lightly = peers.lightly_ntxent()
                found[name] = lightly
            else:
                found[name] = peers.metric_learning(name)
        except ImportError as error:
            print(f"{name}: left out ({error})", flush=True)
    return found


def bench_case(case: Case, turns: int) -> list[dict[str, object]]:
    torch.compiler.reset()  # a case is three shapes, of which eight are compiled
    arguments, sides = inputs(case), losses(case)
    values = {name: float(step(loss, arguments, ())()) for name, loss in sides.items()}
    for name, value in values.items():
        if abs(value - values[OURS]) > 1e-4 * abs(values[OURS]):
            raise AssertionError(f"{case.name}: {name} gives {value}, {OURS} gives {values[OURS]}")
    rows = []
    for kind in case.passes:
        steps: dict[str, Callable[[], object]] = {
            name: step(loss, arguments, PASSES[kind]) for name, loss in sides.items()
        }
        if kind == "forward":
            steps[MM] = lambda: bare_logits(**arguments)
        times = interleave(steps, turns=turns)
        rows += [
            {
                "case": case.name,
                "gradients": {"forward": "none"}.get(kind, kind),
                "loss": name,
                "ms": f"{1e3 * time.median:.2f}",
                "wscl_fast is faster by": f"{times[OURS].times_faster_than(time):.2f}",
            }
            for name, time in times.items()
        ]
        show(rows[-len(times) :])
        print(flush=True)
    return rows


MEMORY = """
import torch
torch.set_num_threads({threads})
from benchmarks.harness import step
from benchmarks.peers_infonce import CASES, Case, inputs, losses
from dataclasses import replace
case = CASES[{number}]
loss = losses(replace(case, rivals=({name!r},) if {name!r} != {ours!r} else ()))[{name!r}]
small = replace(case, n=64, m=case.m and 64)
if {name!r} != "compiled naive":
    step(loss, inputs(small), ("queries", "keys"))()
arguments = inputs(case)
measured = step(loss, arguments, ("queries", "keys"))
if {name!r} == "compiled naive":
    measured()
"""


def bench_memory(number: int, threads: int) -> list[dict[str, object]]:
    """MiB above the inputs of a step with both gradients, each in a process of its own."""
    case = CASES[number]
    rows = []
    for name in losses(case):
        script = MEMORY.format(number=number, name=name, ours=OURS, threads=threads)
        rows.append({"case": case.name, "loss": name, "MiB above inputs": f"{peak_memory(script):.0f}"})
    show(rows)
    print(flush=True)
    return rows


def draw(rows: Sequence[dict[str, object]], memory: Sequence[dict[str, object]]) -> None:
    """A bar for every loss: milliseconds of a step with both gradients, and its memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    figure, grid = plt.subplots(len(cases), 2, figsize=(10, 0.6 + 1.35 * len(cases)), squeeze=False)
    for axes, case in zip(grid, cases, strict=True):
        times = {
            r["loss"]: float(str(r["ms"])) for r in rows if (r["case"], r["gradients"]) == (case, "both")
        }
        sizes = {r["loss"]: float(str(r["MiB above inputs"])) for r in memory if r["case"] == case}
        for axis, values, unit in ((axes[0], times, "ms"), (axes[1], sizes, "MiB")):
            names = list(values)[::-1]
            colours = ["#D55E00" if name == OURS else "#999999" for name in names]
            bars = axis.barh(names, [values[name] for name in names], color=colours)
            texts = [f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in values.values()][::-1]
            axis.bar_label(bars, [f" {text} {unit}" for text in texts], fontsize=8)
            axis.set_xscale("log")
            axis.margins(x=0.25)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.tick_params("x", which="both", bottom=False, labelbottom=False)  # every bar says its number
            axis.set_title(case if unit == "ms" else "memory above inputs", fontsize=9, loc="left")
    figure.suptitle(
        f"Forward and backward, both gradients, float32 (bars on a logarithmic scale)\n{rows[0]['machine']}",
        fontsize=9,
    )
    save_figure(figure, "peers_infonce")


def main() -> None:
    parser = argparse.ArgumentParser(description="Clustered InfoNCE beside its peers, on the CPU")
    add_counts(parser, turns=5)
    parser.add_argument("--only", default="", help="those cases whose name has this; the other rows stay")
    options = parser.parse_args()
    check_only(parser, options.only, [case.name for case in CASES])
    chosen = [i for i, case in enumerate(CASES) if options.only in case.name]
    torch.set_num_threads(options.threads)
    print(machine(), end="\n\n", flush=True)
    rows = [row for i in chosen for row in bench_case(CASES[i], options.turns)]
    memory = [row for i in chosen for row in bench_memory(i, options.threads)]
    order = [case.name for case in CASES]
    rows = keep("peers_infonce", [{**row, "machine": machine()} for row in rows], order)
    memory = keep("peers_infonce_memory", memory, order)
    write_csv("peers_infonce", rows)
    write_csv("peers_infonce_memory", memory)
    draw(rows, memory)


if __name__ == "__main__":
    main()
