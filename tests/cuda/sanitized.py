"""Small problems through every CUDA operator of the losses and of k-means: what compute-sanitizer watches.

Usage: compute-sanitizer --tool memcheck python tests/cuda/sanitized.py [--device cuda] [--short]

``--short``: fewer rows, for racecheck, which takes its time over every access to shared memory. Each kernel
still has several tiles of columns on their way at once, and a last one that is not full.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from wscl_fast import functional

Rows = tuple[int, int]  # of queries and of keys
WHOLE, SHORT = (130, 300), (66, 140)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clustered(
    device: torch.device, rows: Rows, dtype: torch.dtype, d: int, positives: str, in_batch: bool
) -> Tensor:
    """The loss that has kernels of its own: its mean, or where d is small every row's loss, with weights."""
    queries, keys = sides(device, rows, dtype, d)
    zq, zk = ids(device, rows)
    given = {} if in_batch else {"keys": keys, "key_clusters": zk}
    if d < 64:
        given["weights"] = torch.rand(len(queries), device=device)
    return functional.clustered_infonce(
        queries, query_clusters=zq, positives=positives, temperature=5.0, impl="fused", **given
    )


def others(device: torch.device, rows: Rows, dtype: torch.dtype, d: int) -> list[Tensor]:
    """What is put together from log-sum-exps of one and of both directions, softplus and tags."""
    (x, y), (zx, zy) = sides(device, rows, dtype, d), ids(device, rows)
    by_ids = {"query_clusters": zx, "key_clusters": zy, "temperature": 5.0, "impl": "fused"}
    by_sides = {"x_clusters": zx, "y_clusters": zy, "temperature": 5.0, "impl": "fused"}
    tags = {"query_auxiliary": 1 << zx.clamp(min=0), "key_auxiliary": 1 << zy.clamp(min=0)}
    return [
        functional.clustered_infonce(x, y, denominator="other", **by_ids),
        functional.clustered_infonce(x, y, denominator="decoupled", hardness=1.0, **by_ids),
        functional.clip_loss(x, y, **by_sides),
        functional.clip_loss(x, y, positives="in", **by_sides),
        functional.siglip_loss(x, y, **by_sides),
        functional.soft_infonce(x, y, affinity="jaccard", temperature=5.0, impl="fused", **tags),
    ]


def sides(device: torch.device, rows: Rows, dtype: torch.dtype, d: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, d).to(device, dtype).requires_grad_() for count in rows)


def ids(device: torch.device, rows: Rows) -> tuple[Tensor, ...]:
    return tuple(torch.randint(-1, 5, (count,)).to(device) for count in rows)


def finish(loss: Tensor) -> None:
    """Its gradients too."""
    loss.backward()
    assert bool(loss.isfinite())


def problems(device: torch.device, rows: Rows) -> Iterator[tuple[str, int]]:
    """Runs them, a few at a time: what was run, and how many problems that was."""
    torch.manual_seed(0)
    for dtype, d in itertools.product(DTYPES, (40, 128, 256, 300)):
        cases = list(itertools.product(("out", "in"), (False, True)))
        for case in cases:
            finish(clustered(device, rows, dtype, d, *case))
        yield f"clustered_infonce, {dtype}, d = {d}", len(cases)
    for dtype, d in itertools.product(DTYPES, (40, 300)):
        losses = others(device, rows, dtype, d)
        for loss in losses:
            finish(loss)
        yield f"other losses, {dtype}, d = {d}", len(losses)
    for dtype in DTYPES:
        x, centroids = torch.randn(300, 40).to(device, dtype), torch.randn(70, 40).to(device)
        functional.kmeans_update(x, centroids, impl="fused")
        functional.kmeans_assign(x, centroids, top=3, impl="fused")
        yield f"k-means, {dtype}", 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    done, start = 0, time.monotonic()
    for what, count in problems(device, SHORT if options.short else WHOLE):
        done += count
        print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(done, "problems", flush=True)
