"""The losses of CLIP and SigLIP as modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from wscl_fast.distributed import Gather
from wscl_fast.distributed import clip_loss as distributed_clip
from wscl_fast.distributed import siglip_loss as distributed_siglip
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional import Impl, Positives, Reduction, clip_loss, siglip_loss
from wscl_fast.functional._checks import check_bool, check_choice, check_id, check_matrix
from wscl_fast.functional.two_way import check_bias
from wscl_fast.losses._module import LossModule
from wscl_fast.losses._temperature import shown
from wscl_fast.losses._views import check_ids

__all__ = ["CLIPLoss", "SigLIPLoss"]


class _TwoSides(LossModule):
    """What both have in common: rows of two encoders that are one sample each."""

    gathers = ("all", "ring")

    def _sides(self, x: Tensor, y: Tensor, clusters: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both, of length one where the module makes them so."""
        for name, side in (("x", x), ("y", y)):
            check_matrix(name, side)
        if len(y) != len(x):
            raise ValueError(f"y: expected {len(x)} rows as in x, got {len(y)}")
        if clusters is not None:
            check_ids("clusters", clusters, x, other="x")
        return self._directions("x", x), self._directions("y", y)


class CLIPLoss(_TwoSides):
    """InfoNCE in both directions between two encoders' outputs, over the clusters of their samples.

    In plain PyTorch: ``clip_loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), x_clusters=clusters,
    temperature=temperature)``, see :func:`wscl_fast.functional.clip_loss`.

    Args:
        temperature: positive; the starting value where it is learnt.
        learnable_temperature: make the logarithm of 1 / temperature a parameter, as CLIP does.
        min_temperature: lower limit of a learnable temperature.
        positives: ``"out"`` or ``"in"``.
        normalize: divide both sides by their Euclidean norm first.
        ignore_index: the cluster id that says "no cluster".
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[2 B]``: the rows of x, then those of y).
        impl: ``"auto"``, ``"fused"``, ``"chunked"`` or ``"reference"``.
        gather: ``"all"`` or ``"ring"`` for the loss over the batch of all ranks, see
            :func:`wscl_fast.distributed.clip_loss`; ``"none"`` for this process alone.
        group: the process group of ``gather``; by default all processes.
        ddp: with ``gather``, whether the gradients will be averaged over the ranks.

    Shape:
        x, y ``[B, d]``; clusters ``[B]`` int64. The loss is 0-dim, or ``[2 B]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = CLIPLoss()
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16)).backward()

    Source: Radford et al., ICML 2021 (arXiv 2103.00020).
    """

    def __init__(
        self,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        *,
        min_temperature: float = 0.01,
        positives: Positives = "out",
        normalize: bool = True,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        gather: Gather | Literal["none"] = "none",
        group: Group = None,
        ddp: bool = False,
    ) -> None:
        super().__init__(
            temperature,
            learnable_temperature,
            min_temperature=min_temperature,
            normalize=normalize,
            reduction=reduction,
            impl=impl,
            gather=gather,
            group=group,
            ddp=ddp,
        )
        check_choice("positives", positives, Positives)
        self.positives: Positives = positives
        self.ignore_index = check_id("ignore_index", ignore_index)

    def forward(self, x: Tensor, y: Tensor, clusters: Tensor | None = None) -> Tensor:
        """The loss of ``x [B, d]`` and ``y [B, d]``, row i of the one and of the other being one sample.

        Args:
            x: the embeddings of one side.
            y: of the other.
            clusters: ``[B]`` int64; by default every sample is its own.
        """
        x, y = self._sides(x, y, clusters)
        loss: Tensor = self._choose(clip_loss, distributed_clip)(
            x,
            y,
            x_clusters=clusters,
            temperature=self.clamped_temperature(),
            positives=self.positives,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            impl=self.impl,
        )
        if clusters is not None:  # without, every row has its positive
            self._warn_without_positives(loss)
        return loss

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.describe_temperature()}, positives={self.positives!r}, impl={self.impl!r}"


class SigLIPLoss(_TwoSides):
    """A sigmoid for each pair of two encoders' outputs, over the clusters of their samples.

    In plain PyTorch: ``siglip_loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), x_clusters=clusters,
    temperature=temperature, bias=bias)``, see :func:`wscl_fast.functional.siglip_loss`.

    Args:
        temperature: positive; the starting value where it is learnt.
        bias: the starting value where it is learnt: strongly negative, since nearly all pairs are.
        learnable: make the logarithm of 1 / temperature and the bias parameters.
        min_temperature: lower limit of a learnable temperature.
        normalize: divide both sides by their Euclidean norm first.
        ignore_index: the cluster id that says "no cluster".
        reduction: ``"mean"`` over the rows of x, ``"sum"`` or ``"none"``.
        impl: ``"auto"``, ``"fused"``, ``"chunked"`` or ``"reference"``.
        gather: ``"all"`` or ``"ring"`` for the loss over the pairs of all ranks: every rank's x meets all
            ranks' y; ``"none"`` for this process alone.
        group: the process group of ``gather``; by default all processes.
        ddp: with ``gather``, whether the gradients will be averaged over the ranks.

    Shape:
        x, y ``[B, d]``; clusters ``[B]`` int64. The loss is 0-dim, or ``[B]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = SigLIPLoss()
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16)).backward()

    Source: Zhai et al., ICCV 2023 (arXiv 2303.15343).
    """

    idle = "no row of this batch had an id"

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        learnable: bool = True,
        *,
        min_temperature: float = 0.001,
        normalize: bool = True,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        gather: Gather | Literal["none"] = "none",
        group: Group = None,
        ddp: bool = False,
    ) -> None:
        check_bool("learnable", learnable)
        super().__init__(
            temperature,
            learnable,
            min_temperature=min_temperature,
            normalize=normalize,
            reduction=reduction,
            impl=impl,
            gather=gather,
            group=group,
            ddp=ddp,
        )
        bias = check_bias(bias)
        self.bias: nn.Parameter | float = nn.Parameter(torch.tensor(bias)) if learnable else bias
        self.ignore_index = check_id("ignore_index", ignore_index)

    def forward(self, x: Tensor, y: Tensor, clusters: Tensor | None = None) -> Tensor:
        """The loss of ``x [B, d]`` and ``y [B, d]``, row i of the one and of the other being one sample.

        Args:
            x: the embeddings of one side.
            y: of the other.
            clusters: ``[B]`` int64; by default every sample is its own.
        """
        x, y = self._sides(x, y, clusters)
        loss: Tensor = self._choose(siglip_loss, distributed_siglip)(
            x,
            y,
            x_clusters=clusters,
            temperature=self.clamped_temperature(),
            bias=self.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            impl=self.impl,
        )
        self._warn_without_positives(loss)
        return loss

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.describe_temperature()}, bias={shown(self.bias)}, impl={self.impl!r}"
