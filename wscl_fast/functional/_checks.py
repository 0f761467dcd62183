"""Checks of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT64 = torch.iinfo(torch.int64)


def check_number(name: str, value: object, kind: str = "a number") -> float:
    """Python's own number, of numpy's too."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")
    return float(value)


def check_positive(name: str, value: object, kind: str = "a number") -> float:
    """A finite number above 0."""
    number = check_number(name, value, kind)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return number


def check_range(name: str, value: object, low: float, below: float) -> float:
    """A number of ``[low, below)``."""
    number = check_number(name, value)
    if not low <= number < below:
        raise ValueError(f"{name}: expected a number of at least {low} and below {below}, got {value}")
    return number


def check_id(name: str, value: object) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not INT64.min <= value <= INT64.max:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")
    return value


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is not one of a Literal's."""
    allowed: tuple[str, ...] = choices.__args__  # typing.get_args takes longer than all else here
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def refuse_vmap(name: str, value: Tensor) -> None:
    """Refuse a tensor that ``torch.vmap`` maps over: the passes look at ids, and sort them."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise NotImplementedError(
                f"{name}: torch.vmap is not supported; call the function for each batch, or once for all of"
                " them with cluster ids and keys of their own"
            )
        value = functorch.get_unwrapped(value)


def check_floating(name: str, value: object) -> Tensor:
    """A floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    refuse_vmap(name, value)
    return value


def check_matrix(name: str, value: object) -> None:
    """Refuse what is not a floating-point matrix."""
    value = check_floating(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name}: expected a matrix [rows, d], got shape {tuple(value.shape)}")


def check_vector(name: str, value: object, length: int, queries: Tensor, *, integer: bool) -> None:
    """Refuse what is not a vector of that length, on the queries' device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if integer and value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if not integer and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    refuse_vmap(name, value)
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(value.shape)}")
    check_device(name, value, queries)


def check_device(name: str, value: Tensor, queries: Tensor) -> None:
    """Refuse a tensor on another device than the queries."""
    if value.device != queries.device:
        raise ValueError(f"{name}: expected device {queries.device} as queries, got {value.device}")
