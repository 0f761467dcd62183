"""The matrix of simulated cases on this machine's GPU: the CUDA core alone, without PyTorch's extension.

Usage: python tests/cuda/hardware.py [--only FAMILY] [--share I/N]      (needs nvcc and any PyTorch with CUDA)

The cases, the drivers and what results are held to are those of matrix.py. The kernels as nvcc compiles them
for the GPU take the simulator's place, and pinned memory, which has one address for both, that of its memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "hardware"
ARCH = "90"  # of the matrix's cases those of one architecture; they are compiled for the GPU that is here


def build() -> Path:
    """The whole core and the tests' entries as one library."""
    sources = [*(ROOT / "csrc" / "core").glob("*.cu"), HERE / "entry.cu", HERE / "kmeans_entry.cu"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())]

    def compiled(source: Path) -> str:
        made = str(FOLDER / f"{source.stem}.o")
        options = [
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC",
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(source),
            "-o",
            made,
        ]
        subprocess.run([*nvcc, *options], check=True)
        return made

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = FOLDER / "libwscl_hardware.so"
    subprocess.run([*nvcc, "-shared", *objects, "-o", str(library)], check=True)
    return library


class Kernels:
    """The library; every call waits for the GPU."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._loaded, name)

        def call(*arguments: Any) -> int:
            error = function(*arguments)
            torch.cuda.synchronize()
            return int(error)

        return call


class Device:
    """In the place of ``simulator.Device``."""

    def __enter__(self) -> Device:
        self._held: list[Tensor] = []
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()

    def _hold(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor.pin_memory())
        return self._held[-1]

    def put(self, tensor: Tensor, name: str = "") -> Tensor:
        return self._hold(tensor.contiguous())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "") -> Tensor:
        return self._hold(torch.full(shape, 77, dtype=dtype))

    def launches(self) -> list[dict[str, Any]]:
        return []


class Nothing:
    """In the place of the simulator's module."""

    def reset(self) -> None:
        """There is nothing to forget."""


def main() -> int:
    import matrix
    import simulator

    parser = argparse.ArgumentParser(description="The matrix of simulated cases on a GPU")
    parser.add_argument("--only", action="append", choices=matrix.FAMILIES, help="may be repeated")
    parser.add_argument("--library", type=Path, help="built before")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th case from the I-th on")
    options = parser.parse_args()
    kernels = Kernels(options.library or build())
    simulator.ptxsim, simulator.Device = Nothing, Device  # type: ignore[assignment,misc]
    simulator.library = lambda arch="90": kernels  # type: ignore[assignment,misc]
    import simulated_kmeans

    simulated_kmeans.library = lambda arch="90", csrc=None: kernels  # type: ignore[assignment,misc]
    first, step = map(int, options.share.split("/"))
    cases = [
        (name, *case)
        for name, case in matrix.every_case().items()
        if case[1].arch == ARCH and matrix.family_of(case[0]) in (options.only or matrix.FAMILIES)
    ]
    results = [matrix.run_case(*case) for case in cases[first::step]]
    faults = [r for r in results if r["fault"]]
    worst: dict[str, float] = {}
    for r in results:
        key = f"{r['pass']} {r['dtype']}"
        worst[key] = max(worst.get(key, 0.0), r.get("share", 0.0))
    print(f"{torch.cuda.get_device_name()}: {len(results)} cases, {len(faults)} faults", flush=True)
    print(", ".join(f"{key} {share:.2f}" for key, share in worst.items()), "of the allowed error", flush=True)
    for r in faults[:20]:
        print(f"  {r['case']}: {r['fault'].splitlines()[0]}", flush=True)
    return 1 if faults or not results else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    torch.set_num_threads(1)
    sys.exit(main())
