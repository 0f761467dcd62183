"""Small problems through every CUDA operator of the losses and of k-means: what compute-sanitizer watches.

Usage: compute-sanitizer --tool memcheck python tests/cuda/sanitized.py [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from wscl_fast import functional

N, M = 130, 300


def clustered(device: torch.device, dtype: torch.dtype, d: int, positives: str, in_batch: bool) -> Tensor:
    """The loss that has a kernel of its own."""
    queries, keys = sides(device, dtype, d)
    zq, zk = ids(device)
    given = {} if in_batch else {"keys": keys, "key_clusters": zk}
    return functional.clustered_infonce(
        queries, query_clusters=zq, positives=positives, temperature=5.0, impl="fused", **given
    )


def others(device: torch.device, dtype: torch.dtype, d: int) -> list[Tensor]:
    """What is put together from log-sum-exps of one and of both directions, softplus and tags."""
    (x, y), (zx, zy) = sides(device, dtype, d), ids(device)
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


def sides(device: torch.device, dtype: torch.dtype, d: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, d).to(device, dtype).requires_grad_() for rows in (N, M))


def ids(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.randint(-1, 5, (rows,)).to(device) for rows in (N, M))


def finish(loss: Tensor) -> int:
    """Its gradients too; how many problems that was."""
    loss.backward()
    assert bool(loss.isfinite())
    return 1


def problems(device: torch.device, dtypes: Sequence[torch.dtype]) -> int:
    """Runs them; how many there were."""
    torch.manual_seed(0)
    done = 0
    for case in itertools.product(dtypes, (40, 128, 256, 300), ("out", "in"), (False, True)):
        done += finish(clustered(device, *case))
    for dtype, d in itertools.product(dtypes, (40, 300)):
        done += sum(finish(loss) for loss in others(device, dtype, d))
    for dtype in dtypes:
        x, centroids = torch.randn(300, 40).to(device, dtype), torch.randn(70, 40).to(device)
        functional.kmeans_update(x, centroids, impl="fused")
        functional.kmeans_assign(x, centroids, top=3, impl="fused")
        done += 2
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    print(problems(device, (torch.float32, torch.bfloat16, torch.float16)), "problems", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
