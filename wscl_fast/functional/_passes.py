"""Who answers what a loss asks of its pairs, where all keys that the queries meet are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import ClassVar

import torch
from torch import Tensor

from wscl_fast.functional._requests import InBatchLogSumExp, Request
from wscl_fast.functional._trips import Slices, Trip, inputs_of
from wscl_fast.pairs import Pairs

__all__ = ["Passes", "in_blocks"]

MOST = 3 << 19  # numbers that rows may have to be taken at once: a copy in float32 has 6 MiB


def in_blocks(rows: Tensor) -> bool:
    """Whether there are so many keys, or queries, that kernels of the CPU take keys block by block, where a
    loss reads them more than once.

    A request for itself needs memory of the size of all rows: their gradient, or a copy of them in another
    dtype or order. A graph that is being traced takes all at once.
    """
    return rows.numel() > MOST and not torch.compiler.is_compiling() and rows.is_cpu


class Passes:
    """Answers where all keys that the queries meet are at hand."""

    whole: ClassVar[bool] = True  # whether they are

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        # Queries and keys, and the same as the last trip gave them back.
        self._passed_on: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, requests: Mapping[str, Request]) -> dict[str, Tensor]:
        """The value of each request."""
        # Within a batch half of the pairs will do, which blocks would meet twice.
        asked = {
            name: request
            for name, request in requests.items()
            if self._in_trips(request.pairs) and not isinstance(request, InBatchLogSumExp)
        }
        got = {name: request.here(self.fused) for name, request in requests.items() if name not in asked}
        if asked:
            made = list(asked.values())
            pairs = made[0].pairs
            given = queries, keys = pairs.queries, pairs.keys
            if self._passed_on is not None and all(map(is_, self._passed_on[0], given)):
                queries, keys = self._passed_on[1]
            results = Trip.apply(  # type: ignore[no-untyped-call]
                queries, keys, pairs.scale.abs(), Slices(self.fused), made, *inputs_of(made)
            )
            values, again = results[: len(made)], results[len(made) :]
            self._passed_on = given, (again[0], again[-1])
            got |= dict(zip(asked, values, strict=True))
        return got

    def folded(self, pairs: Pairs) -> Pairs:
        """The scale folded into the queries, where their gradients have to meet before one is taken of it.

        A trip over blocks of keys reads the scale's gradient off the queries', and needs no copy of them.
        """
        return pairs if self._in_trips(pairs) else pairs.folded()

    def _in_trips(self, pairs: Pairs) -> bool:
        return self.fused and (in_blocks(pairs.keys) or in_blocks(pairs.queries))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each of some numbers ``[K]`` over all processes that share the loss."""
        return values
