"""What the fake kernels say of CUDA tensors, held against what the bindings give.

A fake kernel that is wrong about a result's shape or dtype shows only where ``torch.compile`` generates code
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode


def described(operator: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The results of ``torch.ops.wscl_fast``'s operator for such arguments on a GPU, without values."""
    with FakeTensorMode():
        on_gpu = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in arguments
        ]
        found = getattr(torch.ops.wscl_fast, operator)(*on_gpu)
    return [found] if isinstance(found, Tensor) else list(found)


class Described:
    """Operators whose every result has to be as its fake kernel describes it."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(self._operators, name)

        def call(*arguments: Any) -> Any:
            results = operator(*arguments)
            got = [results] if isinstance(results, Tensor) else list(results)
            for place, (one, other) in enumerate(zip(got, described(name, arguments), strict=True)):
                assert one.shape == other.shape, (name, place, one.shape, other.shape)
                assert one.dtype == other.dtype, (name, place, one.dtype, other.dtype)
                assert one.stride() == other.stride(), (name, place)
            return results

        return call
