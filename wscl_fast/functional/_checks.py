"""Checks of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wscl_fast.values import may_look

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = torch.finfo(torch.float64).max
LARGEST_FLOAT32 = torch.finfo(torch.float32).max  # of the dtype that is computed in where no input is float64
INT64 = torch.iinfo(torch.int64)


def check_bool(name: str, value: object) -> bool:
    """Python's own truth value, or numpy's: anything else that counts as true is most likely a slip."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def check_number(name: str, value: object, kind: str = "a number") -> float:
    """Python's own number, of numpy's too."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(
            f"{name}: expected {kind} that a float holds, got an int of {value.bit_length()} bits"
        )
    return float(value)


def check_positive(name: str, value: object, kind: str = "a number") -> float:
    """A finite number above 0."""
    number = check_number(name, value, kind)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return number


def check_divisor(
    name: str, value: object, kind: str = "a number", dtype: torch.dtype = torch.float32
) -> float:
    """A finite number above 0 whose inverse the dtype has too, a temperature's say."""
    number, least = check_positive(name, value, kind), torch.finfo(dtype).tiny
    if number < least:
        raise ValueError(f"{name}: expected at least {least} in {dtype}, got {value}")
    return number


def check_range(name: str, value: object, low: float, below: float) -> float:
    """A number of ``[low, below)``."""
    number = check_number(name, value)
    if not low <= number < below:
        raise ValueError(f"{name}: expected a number of at least {low} and below {below}, got {value}")
    return number


def check_int(name: str, value: object) -> int:
    """Python's own whole number, or numpy's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def check_id(name: str, value: object) -> int:
    """A whole number that int64 has."""
    number = check_int(name, value)
    if not INT64.min <= number <= INT64.max:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")
    return number


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is not one of a Literal's."""
    allowed: tuple[str, ...] = choices.__args__  # typing.get_args takes longer than all else here
    if not isinstance(value, str) or value not in allowed:
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


def refuse_func_grad(impl: str, *tensors: Tensor) -> None:
    """Refuse gradients by ``torch.func``, which takes neither the kernels' own nor checkpoints."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    tracked = torch._C._functorch.is_gradtrackingtensor
    if any(tracked(tensor) and tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(f"impl: expected 'reference' under torch.func.grad, got {impl!r}")


def check_tensor(name: str, value: object) -> Tensor:
    """A dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    refuse_vmap(name, value)
    return value


def check_floating(name: str, value: object) -> Tensor:
    """A dense floating-point tensor."""
    value = check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def check_matrix(name: str, value: object) -> None:
    """Refuse what is not a floating-point matrix."""
    value = check_floating(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name}: expected a matrix [rows, d], got shape {tuple(value.shape)}")


def check_vector(
    name: str, value: object, length: int, beside: Tensor, *, integer: bool, other: str = "queries"
) -> None:
    """Refuse what is not a vector of that length, on the device of what it stands beside."""
    value = check_tensor(name, value)
    if integer and value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if not integer and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), got {tuple(value.shape)}")
    check_device(name, value, beside, other=other)


def check_device(name: str, value: Tensor, beside: Tensor, *, other: str = "queries") -> None:
    """Refuse a tensor on another device than the one beside it, which the caller knows as ``other``."""
    if value.device != beside.device:
        raise ValueError(f"{name}: expected device {beside.device} as {other}, got {value.device}")


def check_all_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity, where one may look."""
    if may_look(value) and not bool(value.detach().isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
