"""Clustered InfoNCE on the CPU: share of the multiply-add peak, and ratios to plain PyTorch.

Usage: python -m benchmarks.bench_infonce [--full] [--threads N]

Of each case four things are timed: the forward pass alone (1 GEMM), forward and backward with keys that need
no gradient (2), with both gradients (4), and, where it fits, the same loss as users write it in PyTorch
today, with an N × M matrix. Beside them runs ``torch.mm`` of the bare logits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import Timing, interleave, machine, peak_memory, show, write_csv
from wscl_fast.functional import clustered_infonce

QUICK = [(1024, 32768, 128), (256, 4096, 128), (1024, 65536, 64), (1024, 8192, 768)]
FULL = [(n, m, d) for d in (64, 128, 256, 768) for m in (4096, 65536) for n in (256, 1024, 4096)]
CLUSTERS = 150
MOST_LOGITS = 1 << 27  # of a matrix that the PyTorch baseline may materialise

# The fewest GEMMs any exact method needs, which is also what ours count.
GEMMS = {"forward": 1, "keys detached": 2, "both gradients": 4}


def inputs(n: int, m: int, d: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "queries": normalize(torch.randn(n, d, generator=generator), dim=1),
        "keys": normalize(torch.randn(m, d, generator=generator), dim=1),
        "query_clusters": torch.randint(CLUSTERS, (n,), generator=generator),
        "key_clusters": torch.randint(CLUSTERS, (m,), generator=generator),
    }


def plain(queries: Tensor, keys: Tensor, query_clusters: Tensor, key_clusters: Tensor) -> Tensor:
    """The loss as people write it: logits, a mask, two reductions."""
    logits = queries @ keys.T / 0.1
    mask = (query_clusters[:, None] == key_clusters).float()
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    return -((mask * log_probability).sum(1) / mask.sum(1).clamp(min=1)).mean()


def step(
    loss: Callable[..., Tensor], arguments: dict[str, Any], gradients: tuple[str, ...]
) -> Callable[[], None]:
    def run() -> None:
        leaves = {name: arguments[name].detach().requires_grad_() for name in gradients}
        with torch.set_grad_enabled(bool(gradients)):
            value = loss(**{**arguments, **leaves})
        if gradients:
            value.backward()

    return run


def fused(**arguments: Any) -> Tensor:
    return clustered_infonce(**arguments, temperature=0.1, impl="fused")


def bench_case(n: int, m: int, d: int, turns: int) -> list[dict[str, object]]:
    arguments = inputs(n, m, d)
    needs = {"forward": (), "keys detached": ("queries",), "both gradients": ("queries", "keys")}
    sides: dict[str, Callable[[], object]] = {
        f"fused {name}": step(fused, arguments, gradients) for name, gradients in needs.items()
    }
    sides["torch.mm"] = lambda: arguments["queries"] @ arguments["keys"].T
    if n * m <= MOST_LOGITS:
        sides["plain forward"] = step(plain, arguments, ())
        sides["plain both gradients"] = step(plain, arguments, ("queries", "keys"))
    times = interleave(sides, turns=turns)
    rows = []
    for name, gemms in GEMMS.items():
        ours, rival = times[f"fused {name}"], times.get(f"plain {name}")
        rows.append(
            {
                "N": n,
                "M": m,
                "d": d,
                "pass": name,
                "ms": f"{1e3 * ours.median:.2f}",
                "GFLOP/s": f"{2e-9 * n * m * d * gemms / ours.median:.0f}",
                "share of peak": f"{ours.share(2 * n * m * d * gemms):.3f}",
                "x torch.mm": f"{ours.times_faster_than(times['torch.mm']):.2f}",
                "x plain": f"{ours.times_faster_than(rival):.2f}" if isinstance(rival, Timing) else "",
            }
        )
    return rows


MEMORY = """
import torch
from benchmarks.bench_infonce import fused, inputs, step
step(fused, inputs(64, 64, {d}), ("queries", "keys"))()
arguments = inputs({n}, {m}, {d})
measured = step(fused, arguments, ("queries", "keys"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Clustered InfoNCE on the CPU against the machine and PyTorch"
    )
    parser.add_argument("--full", action="store_true", help="all sizes (about 15 minutes on 2 cores)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--turns", type=int, default=7, help="how often each side is timed (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    rows = [row for case in (FULL if options.full else QUICK) for row in bench_case(*case, options.turns)]
    show(rows)
    memory = [
        {
            "N": n,
            "M": m,
            "d": d,
            "MiB of the gradients": f"{(n + m) * d * 4 / 2**20:.0f}",
            "MiB above inputs": f"{peak_memory(MEMORY.format(n=n, m=m, d=d)):.0f}",
            "MiB of one N x M matrix": f"{n * m * 4 / 2**20:.0f}",
        }
        for n, m, d in ((1024, 32768, 128), (4096, 65536, 128))
    ]
    print()
    show(memory)
    write_csv("infonce", [{**row, "machine": machine()} for row in rows])
    write_csv("infonce_memory", memory)


if __name__ == "__main__":
    main()
