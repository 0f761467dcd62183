"""The CUDA bindings of the losses on simulated memory: ``torch.ops.wscl_fast_simulated``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from simulated_kmeans import SIMULATED
from simulator import CSRC, library, ptxsim, staged

OPERATORS = (
    "infonce_forward",
    "infonce_backward",
    "infonce_reduced_forward",
    "infonce_reduced_backward",
    "logsumexp",
    "logsumexp_key_gradient",
    "two_way_logsumexp",
    "two_way_logsumexp_backward",
    "softplus_sum",
    "softplus_sum_key_gradient",
    "tag_weighted_sum",
)


@functools.cache
def binding() -> Any:
    """Registers the operators; the library that holds them."""
    kernels = Path(library()._name)  # skips where there is no simulator, so before anything is defined
    for name in OPERATORS:
        SIMULATED.define(str(getattr(torch.ops.wscl_fast, name).default._schema).removeprefix("wscl_fast::"))
    headers = Path(torch.__file__).parent / "include"
    # Python loads torch's symbols for itself; the binding needs them.
    ctypes.CDLL(str(headers.parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    sources, folder = staged(CSRC / "binding" / f"{name}_cuda.cpp" for name in ("infonce", "pairs", "tags"))
    return ptxsim().load(
        ptxsim().compile_kernels(
            sources,
            include_dirs=[folder],
            defines=["WSCL_SIMULATED", "TORCH_TARGET_VERSION=0x020b000000000000"],
            flags=[
                *(f"-I{folder}" for folder in (headers, headers / "torch" / "csrc" / "api" / "include")),
                f"-L{kernels.parent}",
                f"-l:{kernels.name}",
                f"-Xlinker=-rpath={kernels.parent}",
            ],
        )
    )
