"""Who answers what a loss asks of its pairs, where all keys that the queries meet are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from wscl_fast.functional._requests import InBatchLogSumExp, Request
from wscl_fast.functional._trips import Slices, Trip, inputs_of

__all__ = ["Passes", "in_blocks"]

MOST = 1 << 22  # numbers that keys may have to be taken at once: a copy in float32 has 16 MiB


def in_blocks(keys: Tensor) -> bool:
    """Whether kernels of the CPU take these keys block by block, where a loss reads them more than once.

    A request for itself needs memory of the size of all keys: their gradient, or a copy of them in another
    dtype or order. A graph that is being traced takes all keys at once.
    """
    return keys.numel() > MOST and keys.device.type == "cpu" and not torch.compiler.is_compiling()


class Passes:
    """Answers where all keys that the queries meet are at hand."""

    whole: ClassVar[bool] = True  # whether they are

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self._passed_on: tuple[Tensor, Tensor] | None = None  # the keys, and as the last trip gave them back

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """The value of each request."""
        asked = list(requests.values())
        queries, keys = asked[0].pairs[:2]
        # Within a batch half of the pairs will do, which blocks would meet twice.
        halved = any(isinstance(request, InBatchLogSumExp) for request in asked)
        if not self.fused or halved or not in_blocks(keys):
            return {name: request.here(self.fused) for name, request in requests.items()}
        known = keys
        if self._passed_on is not None and self._passed_on[0] is keys:
            known = self._passed_on[1]
        route = Slices(self.fused)
        *values, passed_on = Trip.apply(queries, known, route, asked, *inputs_of(asked))  # type: ignore[no-untyped-call]
        self._passed_on = keys, passed_on
        return dict(zip(requests, values, strict=True))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each of some numbers ``[K]`` over all processes that share the loss."""
        return values
