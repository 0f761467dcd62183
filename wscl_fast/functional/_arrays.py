"""The public functions over arrays of other libraries."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from torch import Tensor

from wscl_fast.arrays import as_tensor

P = ParamSpec("P")
R = TypeVar("R")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of tensors take numpy and CuPy arrays, and any other with ``__dlpack__``.

    Nothing is copied that need not be: an array on a GPU stays there. Where the first argument is such an
    array, tensors in the result come back as its kind (without a history: other libraries have no autograd);
    where it is a tensor, they stay tensors.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(_is_foreign, args)) and not any(map(_is_foreign, kwargs.values())):
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)  # errors say what the function calls an argument
        given = bound.arguments
        made = {name: as_tensor(x, name) for name, x in given.items() if _is_foreign(x)}
        given.update({name: tensor for name, (tensor, _) in made.items()})
        result = function(*bound.args, **bound.kwargs)
        first = next(iter(given))
        return cast(R, _given(result, made[first][1])) if first in made else result

    return wrapped


_KNOWN = Tensor, int, float, str, NoneType


def _is_foreign(value: object) -> bool:
    if isinstance(value, _KNOWN):  # what is traced cannot be asked for attributes
        return False
    return isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")


def _given(result: Any, give: Callable[[Tensor], Any]) -> Any:
    """The result with every tensor in it given back."""
    if isinstance(result, Tensor):
        return give(result.detach())
    if isinstance(result, tuple):
        parts = [_given(part, give) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result
