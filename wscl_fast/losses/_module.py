"""What the loss modules have in common: a temperature, settings, sharing over ranks, a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from wscl_fast.distributed import Gather, world_size
from wscl_fast.distributed.collectives import Group
from wscl_fast.distributed.grouped import Grouped
from wscl_fast.functional import Impl, Reduction
from wscl_fast.functional._checks import check_bool, check_choice, check_floating
from wscl_fast.losses._temperature import WithTemperature


class LossModule(Grouped, WithTemperature):
    """A loss of this process alone, or of all ranks together."""

    gathers: ClassVar[tuple[str, ...]] = get_args(Gather)  # what `gather` may be, beside "none"
    idle: ClassVar[str] = (  # why there was nothing to learn
        "no query of this batch had a positive key; draw batches with several samples that belong together or"
        " several views per sample"
    )

    def __init__(
        self,
        temperature: float,
        learnable_temperature: bool,
        *,
        min_temperature: float,
        normalize: bool,
        reduction: Reduction,
        impl: Impl,
        gather: Gather | Literal["none"],
        group: Group,
        ddp: bool,
    ) -> None:
        check_bool("learnable_temperature", learnable_temperature)
        super().__init__(temperature, learnable_temperature, min_temperature)
        check_choice("reduction", reduction, Reduction)
        check_choice("impl", impl, Impl)
        self.normalize = check_bool("normalize", normalize)
        self.reduction: Reduction = reduction
        self.impl: Impl = impl
        if not isinstance(gather, str) or gather not in ("none", *self.gathers):
            *first, last = map(repr, ("none", *self.gathers))
            raise ValueError(f"gather: expected {', '.join(first)} or {last}, got {gather!r}")
        self.gather: Gather | Literal["none"] = gather
        self.group, self.ddp = group, check_bool("ddp", ddp)
        self._warned = False

    def _choose(self, alone: Callable[..., Any], over_ranks: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one process, or the one of all ranks."""
        if self.gather == "none":
            return alone
        return partial(over_ranks, gather=self.gather, group=self.group, ddp=self.ddp)

    def _directions(self, name: str, vectors: Tensor) -> Tensor:
        """Vectors of length one, where the module makes them so."""
        check_floating(name, vectors)
        if not self.normalize:
            return vectors
        eps = max(1e-12, torch.finfo(vectors.dtype).tiny)  # which float16 has not got
        return nn.functional.normalize(vectors, dim=-1, eps=eps)

    def _warn_without_positives(self, loss: Tensor) -> None:
        """Say once that the loss is exactly zero, as where no query has a positive: nothing is learnt then.

        Only of a loss on the CPU, and never while a graph is traced; nor of rows that are this rank's alone.
        """
        if self._warned or torch.compiler.is_compiling() or not loss.is_cpu or not loss.numel():
            return
        if self.reduction == "none" and self.gather != "none" and world_size(self.group) > 1:
            return
        if not (loss.any() if loss.ndim else loss.item()):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: the loss is exactly 0, most likely as {self.idle}",
                stacklevel=3,
            )
