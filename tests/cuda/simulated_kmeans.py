"""K-means through the simulated CUDA core: one call assigns, or assigns and sums up."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulator import CSRC, FLAG, POINTER, PRECISION, SIZE, Device, built_by_cmake, ptxsim, staged
from torch import Tensor


class KMeansProblem(ctypes.Structure):
    """``wscl::cuda::KMeansProblem``."""

    _fields_ = (
        ("precision", ctypes.c_int),
        ("x", POINTER),
        ("x_stride", SIZE),
        ("centroids", POINTER),
        ("n", SIZE),
        ("d", SIZE),
        ("k", SIZE),
        ("cosine", FLAG),
        ("top", ctypes.c_int),
        ("block_rows", SIZE),
        ("assignment", POINTER),
        ("distance", POINTER),
        ("bad_row", POINTER),
        ("sums", POINTER),
        ("weights", POINTER),
        ("counts", POINTER),
        ("weight_sums", POINTER),
        ("inertia", POINTER),
        ("workspace", POINTER),
        ("workspace_bytes", SIZE),
    )


# The schemas of the binding's simulated build, for as long as this lives.
SIMULATED = torch.library.Library("wscl_fast_simulated", "FRAGMENT")


def library(arch: str = "90", csrc: Path = CSRC) -> ctypes.CDLL:
    """The k-means kernels for one architecture, linked with the simulator's runtime.

    The default build has the binding too: its operators are ``torch.ops.wscl_fast_simulated``.
    """
    return _library(arch, csrc)


@functools.cache
def _library(arch: str, csrc: Path) -> ctypes.CDLL:
    sim = ptxsim()
    sim.set_option("GLOBAL_RACE", True)  # the one check that is off by default: between CTAs
    sources = [Path(__file__).parent / "kmeans_entry.cu", *sorted((csrc / "core").glob("kmeans*.cu"))]
    headers, defines, flags = [], [], []
    if arch == "90" and csrc == CSRC:
        for name in ("kmeans_assign", "kmeans_update"):
            schema = str(getattr(torch.ops.wscl_fast, name).default._schema)
            SIMULATED.define(schema.removeprefix("wscl_fast::"))
        if kernels := built_by_cmake():
            sources = []
            flags = [f"-L{kernels.parent}", f"-l:{kernels.name}", f"-Xlinker=-rpath={kernels.parent}"]
        sources.append(csrc / "binding" / "kmeans_cuda.cpp")
        torch_headers = Path(torch.__file__).parent / "include"
        # Python loads torch's symbols for itself; the binding needs them.
        ctypes.CDLL(str(torch_headers.parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        headers = [torch_headers, torch_headers / "torch" / "csrc" / "api" / "include"]
        defines = ["WSCL_SIMULATED", "TORCH_TARGET_VERSION=0x020b000000000000"]
    sources, folder = staged(sources, csrc)
    loaded: ctypes.CDLL = sim.load(
        sim.compile_kernels(sources, include_dirs=[folder, *headers], arch=arch, defines=defines, flags=flags)
    )
    assert loaded.wscl_kmeans_size() == ctypes.sizeof(KMeansProblem)
    return loaded


@dataclass
class Results:
    """What came out, and what the kernels reported. Sums and what follows: of an update."""

    assignment: Tensor
    distance: Tensor
    bad_row: int
    sums: Tensor | None
    counts: Tensor | None
    inertia: Tensor | None
    workspace_bytes: int
    launches: list[dict[str, Any]]


def run(
    x: Tensor,
    centroids: Tensor,
    *,
    cosine: bool = False,
    top: int = 1,
    update: bool = False,
    weights: Tensor | None = None,
    block_rows: int = 0,
    spare_columns: int = 0,
    arch: str = "90",
    csrc: Path = CSRC,
) -> Results:
    """The nearest centroids of the rows of x, and with ``update`` the clusters' sums.

    ``spare_columns`` lie between the rows of x in memory, and are not to be looked at.
    """
    lib = library(arch, csrc)
    (n, d), k = x.shape, len(centroids)
    with Device() as device:
        wide = torch.full((n, d + spare_columns), torch.nan, dtype=x.dtype)
        wide[:, :d] = x
        points, table = device.put(wide, "x"), device.put(centroids.float(), "centroids")
        assignment = device.empty(n, top, dtype=torch.int64, name="assignment")
        distance = device.empty(n, top, name="distance")
        bad_row = device.empty(1, dtype=torch.int64, name="bad_row")
        problem = KMeansProblem(
            precision=PRECISION[x.dtype],
            x=points.data_ptr(),
            x_stride=points.stride(0),
            centroids=table.data_ptr(),
            n=n,
            d=d,
            k=k,
            cosine=cosine,
            top=top,
            block_rows=block_rows,
            assignment=assignment.data_ptr(),
            distance=distance.data_ptr(),
            bad_row=bad_row.data_ptr(),
        )
        sums = counts = inertia = None
        if update:
            sums = device.empty(k, d, dtype=torch.float64, name="sums")
            inertia = device.empty(1, dtype=torch.float64, name="inertia")
            problem.sums, problem.inertia = sums.data_ptr(), inertia.data_ptr()
            counts = device.empty(k, dtype=torch.int64 if weights is None else torch.float64, name="counts")
            if weights is None:
                problem.counts = counts.data_ptr()
            else:
                problem.weights = device.put(weights.double(), "weights").data_ptr()
                problem.weight_sums = counts.data_ptr()
        assert lib.wscl_kmeans(ctypes.byref(problem), None) == 0
        workspace = device.empty(problem.workspace_bytes, dtype=torch.uint8, name="workspace")
        problem.workspace = workspace.data_ptr()
        assert lib.wscl_kmeans(ctypes.byref(problem), None) == 0
        launches = device.launches()
    return Results(
        assignment,
        distance,
        int(bad_row),
        sums,
        counts,
        None if inertia is None else inertia[0],
        problem.workspace_bytes,
        launches,
    )
