"""A few problems through every CUDA kernel of the loss and of k-means, small: what compute-sanitizer watches.

Usage: compute-sanitizer --tool memcheck python tests/cuda/sanitized.py [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch

from wscl_fast import functional


def problems(device: torch.device, dtypes: Sequence[torch.dtype]) -> int:
    """Runs them; how many there were."""
    torch.manual_seed(0)
    done = 0
    for dtype, d, positives, in_batch in itertools.product(
        dtypes, (40, 128, 256, 300), ("out", "in"), (False, True)
    ):
        queries, keys = (torch.randn(rows, d).to(device, dtype).requires_grad_() for rows in (130, 300))
        zq, zk = (torch.randint(-1, 5, (rows,)).to(device) for rows in (130, 300))
        given = {} if in_batch else {"keys": keys, "key_clusters": zk}
        loss = functional.clustered_infonce(
            queries, query_clusters=zq, positives=positives, temperature=5.0, impl="fused", **given
        )
        loss.backward()
        assert bool(loss.isfinite())
        done += 1
    for dtype in dtypes:
        x, centroids = torch.randn(300, 40).to(device, dtype), torch.randn(70, 40).to(device)
        functional.kmeans_update(x, centroids, impl="fused")
        done += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    print(problems(device, (torch.float32, torch.bfloat16, torch.float16)), "problems", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
