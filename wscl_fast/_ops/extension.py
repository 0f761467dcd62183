"""Loading the extension. Importing it registers the operators of ``csrc/binding``."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why it is missing."""
    try:
        return importlib.import_module("wscl_fast._C"), ""
    except ImportError as error:
        return None, str(error)


extension, load_error = _load()
if extension is None:
    warnings.warn(
        f"wscl_fast: the fused kernels could not be loaded ({load_error}); plain PyTorch takes their place."
        " Reinstall wscl-fast with a C++17 compiler to build them.",
        RuntimeWarning,
        stacklevel=2,
    )


def serves(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the fused kernels run on this device, computing in this dtype (or float32 for halves)."""
    return not obstacle(device, dtype)


@functools.cache
def serves_device(index: int) -> bool:
    """``serves`` of a CUDA device, asked once: the question takes as long as two launches."""
    return serves(torch.device("cuda", index))


def obstacle(device: torch.device, dtype: torch.dtype, operator: str = "infonce_forward") -> str:
    """Why an operator's kernels do not run on this device for this dtype; empty where they do."""
    if extension is None:
        return load_error
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or not _has_cuda_kernel(operator):
        return f"there are no kernels for device {device}"
    if dtype == torch.float64:
        return "there are no kernels for float64 on CUDA"
    capability, built = torch.cuda.get_device_capability(device), extension.cuda_architectures
    if not runs_on(capability, built):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, the kernels are for {built}"
    return ""


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for these architectures (as in ``TORCH_CUDA_ARCH_LIST``) runs on a device.

    Machine code runs on devices of its own major version and at least its minor one, PTX on all later ones.
    """
    for architecture in architectures.replace(" ", ";").split(";"):
        number, _, kind = architecture.partition("+")
        major, _, minor = number.rstrip("af").partition(".")
        built = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
        if built and built <= capability and (kind == "PTX" or built[0] == capability[0]):
            return True
    return False


def _has_cuda_kernel(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"wscl_fast::{operator}", "CUDA")


def require(
    device: torch.device, dtype: torch.dtype = torch.float32, operator: str = "infonce_forward"
) -> None:
    """Raises where an operator's kernels do not run."""
    if reason := obstacle(device, dtype, operator):
        raise RuntimeError(f"impl='fused' is not available: {reason}; impl='chunked' works everywhere")


def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


# What holds when torch.compile traces; there is no guard on it. torch.compiler.assume_constant_result does no
# more, and imports Dynamo, which takes as long as importing torch.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allow_tf32(rows: torch.Tensor) -> bool:
    """Whether products of these rows may have TF32's accuracy, by ``torch.backends.cuda.matmul``."""
    return rows.is_cuda and rows.dtype == torch.float32 and _allows_tf32()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute with for rows of a dtype: halves with float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
