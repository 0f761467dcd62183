"""The loss over several processes: all-gather against ring, time of a step and memory of a rank.

Usage: python -m benchmarks.bench_ring [--ranks N ...]

Every rank has its own queries and keys, both with gradients, and one thread; gloo carries the messages. The
variants take turns within the same processes. "no exchange" is the loss of a rank's own rows and keys against
as many keys as all ranks have together: the same products with nothing sent, the floor of the other two.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import at_least_one, machine, show, write_csv
from wscl_fast import distributed, functional

SHAPES = [(1024, 16384, 128), (1024, 65536, 128)]  # N, M, d of a rank
VARIANTS = ("no exchange", "all", "ring")


def inputs(n: int, m: int, d: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "queries": normalize(torch.randn(n, d, generator=generator), dim=1).requires_grad_(),
        "keys": normalize(torch.randn(m, d, generator=generator), dim=1).requires_grad_(),
        "query_clusters": torch.randint(150, (n,), generator=generator),
        "key_clusters": torch.randint(150, (m,), generator=generator),
    }


def step(variant: str, arguments: dict[str, Tensor]) -> Callable[[], None]:
    if variant == "no exchange":
        times = dist.get_world_size()
        arguments = {**arguments, "key_clusters": arguments["key_clusters"].repeat(times)}
        arguments["keys"] = arguments["keys"].detach().repeat(times, 1).requires_grad_()

    def run() -> None:
        for name in ("queries", "keys"):
            arguments[name].grad = None
        if variant == "no exchange":
            functional.clustered_infonce(**arguments).backward()
        else:
            options: dict[str, Any] = {**arguments, "gather": variant}
            distributed.clustered_infonce(**options).backward()

    return run


def resident(name: str) -> int:
    """KiB of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory_of(variant: str, shape: tuple[int, int, int]) -> float:
    """MiB by which this rank grows at most in one step, its inputs standing."""
    step(variant, inputs(8, 8, shape[2], dist.get_rank()))()
    run = step(variant, inputs(*shape, dist.get_rank()))
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    dist.barrier()
    return (resident("VmHWM") - before) / 1024


def time_of(shape: tuple[int, int, int], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn until the last rank is done."""
    steps = {variant: step(variant, inputs(*shape, dist.get_rank())) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns + 1):
        for variant, run in steps.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            if turn:  # the first is the warm-up
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def work(rank: int, ranks: int, folder: str, variant: str | None, shape: Any, turns: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    result = time_of(shape, turns) if variant is None else memory_of(variant, shape)
    results: list[Any] = [None] * ranks
    dist.all_gather_object(results, result)
    if rank == 0:
        torch.save(results, Path(folder, "results"))
    dist.destroy_process_group()


def measure(ranks: int, variant: str | None, shape: tuple[int, int, int], turns: int) -> list[Any]:
    """Of every rank its times, or where a variant is named its memory; in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, folder, variant, shape, turns), nprocs=ranks)  # type: ignore[no-untyped-call]
        results: list[Any] = torch.load(Path(folder, "results"), weights_only=False)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Clustered InfoNCE over several processes")
    parser.add_argument("--ranks", type=at_least_one, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--turns", type=at_least_one, default=5, help="of each variant (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for ranks, shape in itertools.product(options.ranks, SHAPES):
        times = measure(ranks, None, shape, options.turns)[0]
        floor = times["no exchange"]
        for variant in VARIANTS:
            pairs = zip(times[variant], floor, strict=True)
            rows.append(
                {
                    "ranks": ranks,
                    "N, M, d of a rank": " x ".join(map(str, shape)),
                    "keys": variant,
                    "ms": f"{1e3 * statistics.median(times[variant]):.1f}",
                    "x no exchange": f"{statistics.median(ours / least for ours, least in pairs):.2f}",
                    "MiB above inputs": f"{max(measure(ranks, variant, shape, 0)):.0f}",
                    "MiB of a rank's keys": f"{shape[1] * shape[2] * 4 / 2**20:.0f}",
                }
            )
    print(machine())
    show(rows)
    write_csv("ring", [{**row, "machine": machine()} for row in rows])


if __name__ == "__main__":
    main()
