"""What the CUDA k-means kernels execute, counted in the simulator: the numbers of ``docs/kmeans-cuda.md``.

    python tests/cuda/kmeans_counters.py     # prints the tables; a minute or two

Counts are facts about the PTX; ``floor`` is a bound under stated hardware rates, never a timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from simulated_kmeans import Results, run
from simulator import ptxsim
from torch import Tensor

import wscl_fast  # noqa: F401 - the operators' schemas

# Of the pass in its order; `second`: over undecided rows.
PARTS = {
    "centroids": (
        "centroid_lengths",
        "add_slice",
        "find_origin",
        "find_exponent",
        "pack_columns",
        "find_bound",
    ),
    "rows": ("pack_rows",),
    "scan": ("scan_kernel",),
    "decide": ("decide_kernel",),
    "second": ("scan_again_kernel", "merge_kernel"),
    "sort": ("count_digits", "place_tiles", "move_rows"),
    "sums": ("find_begins", "add_chunk", "add_parts", "add_distances", "add_inertia"),
}
MACS_OF_AN_INSTRUCTION = 16 * 8 * 16


def name_of(report: dict[str, Any]) -> str:
    """A kernel's name without namespaces and arguments."""
    name: str = report["kernel"]
    for kernels in PARTS.values():
        for kernel in kernels:
            if kernel in name:
                return kernel
    raise ValueError(f"an unknown kernel: {name}")


@dataclass
class Part:
    """The launches of one part of the pass, added up."""

    matrix_instructions: int = 0
    read: int = 0  # bytes asked for
    written: int = 0
    unique: int = 0  # bytes of distinct sectors, each launch by itself
    sectors: int = 0
    passes: int = 0  # of shared memory
    ideal_passes: int = 0
    local: int = 0
    instructions: int = 0
    launches: int = 0
    floor_ms: float = 0.0
    bound: str = ""

    def coalescing(self) -> float:
        """Bytes asked for in those that their sectors hold."""
        return (self.read + self.written) / max(1, 32 * self.sectors)


def parts_of(results: Results, device: str = "H100") -> dict[str, Part]:
    """The reports of a pass, part by part."""
    parts: dict[str, Part] = {}
    longest: dict[str, float] = {}
    for report in results.launches:
        kernel = name_of(report)
        which = next(part for part, kernels in PARTS.items() if kernel in kernels)
        part, memory, shared = parts.setdefault(which, Part()), report["global"], report["shared"]
        part.matrix_instructions += report["classes"].get("mma", 0)
        part.read += memory["load_bytes"]
        part.written += memory["store_bytes"]
        part.unique += memory["unique_read_bytes"] + memory["unique_written_bytes"]
        part.sectors += memory["load_sectors"] + memory["store_sectors"]
        part.passes += shared["passes"]
        part.ideal_passes += shared["ideal_passes"]
        part.local += memory["local_bytes"]
        part.instructions += report["warp_instructions"]
        part.launches += 1
        floor = ptxsim().floor_ms(report, device)
        part.floor_ms += floor["floor_ms"]
        if floor["floor_ms"] > longest.get(which, 0):
            longest[which], part.bound = floor["floor_ms"], floor["bound"]
    return parts


def problem(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Points of a mixture of many more components than centroids, which are points: as k-means meets them."""
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(4 * k, d, generator=generator)
    x = components[torch.randint(4 * k, (n,), generator=generator)]
    x = x + torch.randn(n, d, generator=generator)
    return x.to(dtype), x[torch.randperm(n, generator=generator)[:k]].to(dtype).float()


def main() -> None:
    """The tables of the documentation."""
    print(
        "| N × K × d | part | matrix instructions / one GEMM | bytes of distinct sectors | coalescing |",
        end="",
    )
    print(" shared passes / ideal | warp instructions | floor on an H100, ms | its bound |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for n, k, d in ((200_000, 1000, 128), (60_000, 100, 64), (100_000, 4096, 256)):
        x, centroids = problem(n, k, d)
        got = run(x, centroids, update=True)
        total = 0.0
        for name, part in parts_of(got).items():
            gemms = part.matrix_instructions * MACS_OF_AN_INSTRUCTION / (n * k * d)
            passes = f"{part.passes / part.ideal_passes:.3f}" if part.ideal_passes else ""
            total += part.floor_ms
            print(
                f"| {n} × {k} × {d} | {name} | {gemms:.4f} | {part.unique / 2**20:.1f} MiB |"
                f" {part.coalescing():.2f} | {passes} | {part.instructions / 1e6:.2f} M |"
                f" {part.floor_ms:.4f} | {part.bound} |"
            )
        workspace = f"workspace {got.workspace_bytes / 2**20:.1f} MiB"
        print(f"| {n} × {k} × {d} | all | | {workspace} | | | | {total:.4f} | |")


if __name__ == "__main__":
    main()
