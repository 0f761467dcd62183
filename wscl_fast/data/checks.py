"""Checks of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_int(value: object, name: str) -> int:
    """The argument ``name`` as Python's own int, of numpy's too."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def check_ids(values: Any, name: str) -> NDArray[np.int64]:
    """The argument ``name`` as one id a sample, int64 [n]."""
    ids = np.asarray(values)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected one dimension [n], got {ids.ndim}")
    return ids.astype(np.int64, copy=False)
