"""Arrays of other libraries as tensors, and back: numpy, and what speaks DLPack."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def as_tensor(array: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """An array as a tensor that shares its memory where it can, and the way back to its own kind.

    Args:
        array: a torch tensor (what comes of it has no history); a numpy array, memory-mapped too; an array
            with `__dlpack__` (CuPy, JAX), on its own device; anything that `numpy.asarray` takes.
        name: what to call it in errors.

    Raises:
        TypeError, ValueError: no numbers, or complex ones.
    """
    if isinstance(array, Tensor):
        return array.detach(), lambda t: t
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
        return from_dlpack(array), _giver_of(array)
    try:
        made = np.asarray(array)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{name}: expected numbers, got {error}") from error
    if made.dtype.kind == "c":
        raise ValueError(f"{name}: Complex data not supported, got {made.dtype}")
    if made.dtype.kind not in "biuf":
        try:
            made = made.astype(np.float64)
        except TypeError as error:  # an object that is no number: scikit-learn's wording asks for a TypeError
            raise TypeError(f"{name}: expected numbers: argument must be a string or a number") from error
        except ValueError as error:
            raise ValueError(f"{name}: expected numbers, got {error}") from error
    if made.dtype.itemsize > 8 or not made.dtype.isnative:
        made = made.astype(np.float64 if made.dtype.itemsize >= 8 else np.float32)
    # torch takes strides of whole elements only, and none below 0.
    if any(stride < 0 or stride % made.itemsize for stride in made.strides):
        made = np.ascontiguousarray(made)
    with warnings.catch_warnings():  # a read-only map is only read
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(made), lambda t: t.cpu().numpy()


def _giver_of(array: Any) -> Callable[[Tensor], Any]:
    """`from_dlpack` of the library that an array belongs to."""
    module: Any = sys.modules.get(type(array).__module__.split(".")[0])
    namespace: Any = getattr(array, "__array_namespace__", lambda: None)()
    for library in (namespace, module):
        if hasattr(library, "from_dlpack"):
            return lambda t: library.from_dlpack(t)
    return lambda t: t
