"""Loading the extension. Importing it registers the operators of ``csrc/binding``."""

from __future__ import annotations

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


def serves(device: torch.device) -> bool:
    """Whether the fused kernels run on this device."""
    return extension is not None and device.type == "cpu"


def require(device: torch.device) -> None:
    """Raises where the fused kernels do not run on this device."""
    if serves(device):
        return
    reason = load_error if extension is None else f"there are no kernels for device {device}"
    raise RuntimeError(f"impl='fused' is not available: {reason}; impl='chunked' works everywhere")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute with for rows of a dtype: halves with float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
