"""One iteration of k-means on a GPU (assign and sum up) beside plain PyTorch, flash-kmeans and cuVS.

Usage: python -m benchmarks.bench_cuda_kmeans [--device cuda] [--json FILE] [--seconds S] [--budget S]

The problems are those of ``bench_kmeans``. A side that gives other assignments than ours is timed all the
same, and its share of equal ones is told: ours are those of float64, float32 products are rounded, and
flash-kmeans multiplies float32 in TF32. ``torch.mm`` of the distances alone is the floor of whoever keeps
float32 products; ours are of float16, which propose, and float64 decides. ``--device cpu`` tries the harness.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import cuda_command
from benchmarks.cuda_timing import measure
from benchmarks.peers_kmeans import CASES, Case
from wscl_fast import _ops
from wscl_fast.functional import kmeans_update

ON_GPU = [*CASES.values(), Case("D", 1_000_000, 128, 4096), Case("E", 250_000, 768, 10_000)]
ON_CPU = [Case("tiny", 2000, 16, 20)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_DISTANCES = 1 << 33  # of a matrix that plain PyTorch makes
Side = Callable[[], Tensor]  # gives the assignments


def ours(x: Tensor, centroids: Tensor) -> Side:
    return lambda: _ops.kmeans_update(x, centroids, weights=None, cosine=False)[0]


def plain(x: Tensor, centroids: Tensor) -> Side:
    def iteration() -> Tensor:
        scores = torch.addmm(centroids.square().sum(dim=1), x, centroids.T, alpha=-2)
        assignment = scores.argmin(dim=1)
        torch.zeros_like(centroids).index_add_(0, assignment, x)
        torch.bincount(assignment, minlength=len(centroids))
        return assignment

    return iteration


def product(x: Tensor, centroids: Tensor) -> Side:
    return lambda: x @ centroids.T


def flash_kmeans(x: Tensor, centroids: Tensor) -> Side:
    from flash_kmeans.assign_euclid_triton import (  # type: ignore[import-not-found]
        euclid_assign_triton,
    )
    from flash_kmeans.centroid_update_triton import (  # type: ignore[import-not-found]
        triton_centroid_update_sorted_euclid,
    )

    squares = x.float().square().sum(1)[None]  # once for all iterations, as it does

    def iteration() -> Tensor:
        assignment: Tensor = euclid_assign_triton(x[None], centroids[None], squares)
        triton_centroid_update_sorted_euclid(x[None], assignment, centroids[None])
        return assignment[0]

    return iteration


def cuvs(x: Tensor, centroids: Tensor) -> Side:
    from cuvs.cluster import kmeans  # type: ignore[import-not-found]

    parameters = kmeans.KMeansParams(n_clusters=len(centroids))

    def assignment() -> Tensor:
        return torch.as_tensor(kmeans.predict(parameters, x, centroids)[0], device=x.device)

    return assignment


MAKERS = {
    "torch: addmm, argmin, index_add": plain,
    "torch.mm alone": product,
    "flash-kmeans": flash_kmeans,
    "cuVS (assignment alone)": cuvs,
}


def bench_case(
    case: Case, samples: Tensor, start: Tensor, seconds: float, reasons: list[str]
) -> list[dict[str, Any]]:
    """Of samples and centroids of one dtype, one iteration after the start."""
    x, device, dtype = samples, samples.device, samples.dtype
    first = kmeans_update(x, start.float())
    centroids = (first.sums / first.counts[:, None].clamp(min=1)).to(dtype)
    mine = ours(x, centroids.float())
    found, rows = mine().long(), []
    us = measure(mine, device, seconds=seconds)
    sides: dict[str, tuple[Any, float]] = {"wscl_fast": (us, 1.0)}
    for name, make in MAKERS.items():
        if make in (plain, product) and case.n * case.k > MOST_DISTANCES:
            reasons.append(f"{name} at {case.name}: left out (the distances would not fit)")
            continue
        try:
            side = make(x, centroids)
            alike = 1.0 if make is product else float((side().long() == found).double().mean())
            sides[name] = (measure(side, device, seconds=seconds), alike)
        except Exception as error:  # a package that is missing or fails, memory
            reason = f"{name}: left out ({type(error).__name__}: {str(error)[:120]})"
            if reason not in reasons:
                reasons.append(reason)
    for name, (time_, alike) in sides.items():
        speed = 2e-9 * case.n * case.k * case.d / time_.median
        rows.append(
            {
                "case": f"{case.name}: {case.n} × {case.k} × {case.d} {str(dtype)[6:]}",
                "side": name,
                "ms": round(time_.median, 4),
                "ms 10 %": round(time_.quantile(0.1), 4),
                "ms 90 %": round(time_.quantile(0.9), 4),
                "TFLOP/s of one GEMM": round(speed, 1),
                "peak MiB": None if time_.peak_bytes is None else round(time_.peak_bytes / 2**20, 1),
                "same assignments": "" if name == "torch.mm alone" else f"{alike:.6f}",
                "wscl_fast is faster by": round(time_.median / us.median, 2),
            }
        )
    return rows


def bench(device: torch.device, cases: list[Case], seconds: float, budget: float) -> dict[str, Any]:
    """Rows of all cases that fit into the budget (seconds), and what was left out."""
    start, reasons, rows = time.monotonic(), list[str](), list[dict[str, Any]]()
    for case in cases:
        if time.monotonic() - start > budget:
            reasons.append(f"{case.name}: left out (the time was up)")
            continue
        x = case.samples()
        centroids = case.start(x)
        for dtype in DTYPES if device.type == "cuda" else (torch.float32,):
            rows += bench_case(case, x.to(device, dtype), centroids.to(device, dtype), seconds, reasons)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    about = [
        "One iteration (assign and sum up); CUDA events, L2 emptied before every repetition; medians, the",
        "first and the last tenth. Ours are the assignments of float64, others' those of their products.",
        "`torch.mm` makes the distances of a float32 problem in float32, flash-kmeans in TF32.",
    ]
    return {"about": about, "rows": rows, "left out": reasons}


if __name__ == "__main__":
    sys.exit(
        cuda_command.main(
            "bench_cuda_kmeans",
            "K-means on a GPU beside its peers",
            bench,
            ON_GPU,
            ON_CPU,
            seconds=0.3,
            budget=90,
        )
    )
