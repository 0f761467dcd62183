"""Clustered InfoNCE on a GPU beside what users would pick instead: time, memory, share of the matrix rate.

Usage: python -m benchmarks.bench_cuda [--device cuda] [--json FILE] [--seconds S]

Every side is checked against the others before it is timed. The yardstick is ``torch.mm`` of 8192 × 8192
bfloat16 matrices, measured in the same process. SDPA(q, k, k) is no loss: it does the two products and the
softmax that a loss with keys that need no gradient does. Inf-CL and cut cross-entropy know one positive a
query (its own key) and are compared where that is the problem. ``--device cpu`` runs the same code on a CPU,
at sizes that suit it, to see that the harness works.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from benchmarks import cuda_command, peers
from benchmarks.cuda_timing import Measured, measure
from benchmarks.harness import step
from wscl_fast.functional import clustered_infonce

CLUSTERS = 150
MOST_LOGITS = 1 << 28  # of a matrix that others may materialise
# GEMMs of 2 N M d flops that the pass needs at least, by the name of what wants a gradient.
WANTED = {"none": (), "queries": ("queries",), "both": ("queries", "keys")}
GEMMS = {"none": 1.0, "queries": 2.0, "both": 4.0}
IN_BATCH = {"none": 0.5, "both": 2.5}


@dataclass(frozen=True)
class Case:
    """A shape; ``m=None`` is the in-batch case, ``own`` a cluster for each sample (InfoNCE)."""

    n: int
    m: int | None
    d: int
    dtype: torch.dtype = torch.bfloat16
    own: bool = False

    def __str__(self) -> str:
        kind = " in-batch" if self.m is None else ""
        ids = " InfoNCE" if self.own else ""
        return f"{self.n} × {self.m or self.n} × {self.d} {str(self.dtype)[6:]}{kind}{ids}"

    @property
    def gemms(self) -> dict[str, float]:
        return IN_BATCH if self.m is None else GEMMS


ON_GPU = [
    Case(8192, 8192, 128),
    Case(8192, 8192, 128, own=True),
    Case(8192, None, 128),
    Case(1024, 65536, 128),
    Case(8192, 8192, 64),
    Case(4096, 16384, 256),
    Case(2048, 16384, 768),
    Case(8192, 8192, 128, torch.float32),
    Case(4096, 262144, 128),
]
ON_CPU = [
    Case(64, 128, 16, torch.float32, own=True),
    Case(64, 128, 16, torch.float32),
    Case(64, None, 16, torch.float32),
]
Loss = Callable[..., Tensor]


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def vectors(rows: int) -> Tensor:
        return normalize(torch.randn(rows, case.d, generator=generator), dim=1).to(device, case.dtype)

    def ids(rows: int) -> Tensor:
        drawn = torch.arange(rows) if case.own else torch.randint(CLUSTERS, (rows,), generator=generator)
        return drawn.to(device)

    made = {"queries": vectors(case.n), "query_clusters": ids(case.n)}
    if case.m is not None:
        made |= {"keys": vectors(case.m), "key_clusters": ids(case.m)}
    return made


def ours(**arguments: Tensor) -> Tensor:
    return clustered_infonce(**arguments, temperature=peers.TEMPERATURE, impl="fused")


def attention(queries: Tensor, keys: Tensor, **_: Tensor) -> Tensor:
    """Not the loss: its products and its softmax."""
    q, k = queries[None, None], keys[None, None]
    return scaled_dot_product_attention(q, k, k, scale=1 / peers.TEMPERATURE).sum()


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss  # type: ignore[import-not-found]

    def loss(queries: Tensor, keys: Tensor, **_: Tensor) -> Tensor:
        rows = cal_flash_loss(queries, keys, scale=1 / peers.TEMPERATURE, head_dim=min(queries.shape[1], 256))
        return rows.mean()  # type: ignore[no-any-return]

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    def loss(queries: Tensor, keys: Tensor, **_: Tensor) -> Tensor:
        targets = torch.arange(len(queries), device=queries.device)
        # Without its filter, which leaves out what it takes for small: all sides are exact.
        return linear_cross_entropy(queries / peers.TEMPERATURE, keys, targets, filter_eps=None)  # type: ignore[no-any-return]

    return loss


def sides(case: Case, reasons: list[str]) -> dict[str, Loss]:
    """By name; those that cannot be had here are left out, with the reason."""
    found: dict[str, Loss] = {"wscl_fast": ours}
    makers: dict[str, Callable[[], Loss]] = {}
    if case.n * (case.m or case.n) <= MOST_LOGITS:
        makers = {"naive PyTorch": lambda: peers.naive, "torch.compile": peers.compiled_naive}
    if case.m is not None:
        makers["SDPA(q, k, k)"] = lambda: attention
        if case.own:
            makers |= {"Inf-CL": inf_cl, "cut cross-entropy": cut_cross_entropy}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # a package may fail to import in any way
            reason = f"{name}: left out ({type(error).__name__}: {error})"
            if reason not in reasons:
                reasons.append(reason)
    return found


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of ``torch.mm`` in bfloat16 (float32 on a CPU)."""
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    return 2e-9 * size**3 / measure(lambda: a @ a, device, repetitions=10).median


def bench_case(
    case: Case, device: torch.device, rate: float, seconds: float, reasons: list[str]
) -> list[dict[str, Any]]:
    arguments, found, rows = inputs(case, device), sides(case, reasons), []
    reference = float(ours(**arguments))
    for name in list(found):
        try:
            value = float(step(found[name], arguments, ())())
            if name != "SDPA(q, k, k)" and abs(value - reference) > 2e-2 * abs(reference):
                raise ArithmeticError(f"gives {value}, wscl_fast gives {reference}")
        except (
            Exception
        ) as error:  # out of memory, a compiler that is missing, a wrong result: told, not timed
            if name == "wscl_fast":
                raise
            reasons.append(f"{name} at {case}: left out ({type(error).__name__}: {str(error)[:200]})")
            del found[name]
    for kind, gemms in case.gemms.items():
        measured: dict[str, Measured] = {}
        for name, loss in found.items():
            try:
                measured[name] = measure(step(loss, arguments, WANTED[kind]), device, seconds=seconds)
            except Exception as error:
                if name == "wscl_fast":
                    raise
                reasons.append(f"{name} at {case}: left out ({type(error).__name__}: {str(error)[:200]})")
        for name, result in measured.items():
            speed = 2e-9 * gemms * case.n * (case.m or case.n) * case.d / result.median
            rows.append(
                {
                    "case": str(case),
                    "gradients": kind,
                    "side": name,
                    "ms": round(result.median, 4),
                    "ms 10 %": round(result.quantile(0.1), 4),
                    "ms 90 %": round(result.quantile(0.9), 4),
                    "TFLOP/s of the fewest GEMMs": round(speed, 2),
                    "share of torch.mm": round(speed / rate, 3),
                    "peak MiB": None if result.peak_bytes is None else round(result.peak_bytes / 2**20, 1),
                    "wscl_fast is faster by": round(result.median / measured["wscl_fast"].median, 2),
                }
            )
    return rows


def bench(device: torch.device, cases: list[Case], seconds: float, budget: float) -> dict[str, Any]:
    """Rows of all cases that fit into the budget (seconds), and what was left out."""
    start, reasons, rows = time.monotonic(), list[str](), list[dict[str, Any]]()
    rate = matrix_rate(device)
    for case in cases:
        if time.monotonic() - start > budget:
            reasons.append(f"{case}: left out (the time was up)")
            continue
        torch.compiler.reset()  # after eight shapes of a function it would run as it was written
        rows += bench_case(case, device, rate, seconds, reasons)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    about = [
        "CUDA events, L2 emptied before every repetition; medians, the first and the last tenth. The",
        "fewest GEMMs are those that any exact method needs (2 N M d flops each: 1 without a gradient,",
        "2 for that of queries, 4 for both, ½ and 2½ in the batch). `torch.mm` of 8192 × 8192 bfloat16:",
        f"{rate:.1f} TFLOP/s.",
    ]
    return {"about": about, "rows": rows, "left out": reasons}


if __name__ == "__main__":
    sys.exit(
        cuda_command.main(
            "bench_cuda",
            "Clustered InfoNCE on a GPU beside its peers",
            bench,
            ON_GPU,
            ON_CPU,
            seconds=0.5,
            budget=240,
        )
    )
