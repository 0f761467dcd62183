"""The loss as an ``nn.Module``, for trainers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from wscl_fast.distributed import Gather
from wscl_fast.distributed import clustered_infonce as distributed_infonce
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional import Impl, Positives, Reduction, clustered_infonce

__all__ = ["ClusteredInfoNCE"]


class ClusteredInfoNCE(nn.Module):
    """Clustered InfoNCE of a batch of embeddings, one or several views of each sample.

    In plain PyTorch, for ``features [B, V, d]``::

        x = F.normalize(features, dim=-1).flatten(0, 1)
        loss = clustered_infonce(x, query_clusters=clusters.repeat_interleave(V), temperature=temperature)

    Every view is a query, contrasted with all other views of the batch; its positives are the views of its
    own cluster, its sample's other views among them. With ``keys`` (a momentum encoder's output, a memory
    queue) the features are contrasted with those instead.

    Args:
        temperature: positive; the starting value where it is learnt.
        learnable_temperature: make the logarithm of 1 / temperature a parameter (as CLIP does); the
            temperature is held at or above ``min_temperature`` by clamping the parameter.
        min_temperature: lower limit of a learnable temperature.
        positives: ``"out"`` or ``"in"``, see :func:`wscl_fast.functional.clustered_infonce`.
        normalize: divide the features (and keys) by their Euclidean norm first.
        base_temperature: multiply the loss by ``temperature / base_temperature``, as the code of SupCon and
            Cl-InfoNCE does with 0.07; by default the loss is left as it is.
        ignore_index: the cluster id that says "no cluster".
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        impl: ``"auto"``, ``"fused"``, ``"chunked"`` or ``"reference"``.
        gather: ``"all"``, ``"ring"`` or ``"count"`` for the loss over the batch of all ranks, see
            :func:`wscl_fast.distributed.clustered_infonce`; ``"none"`` for this process alone.
        group: the process group of ``gather``; by default all processes.
        ddp: with ``gather``, whether the gradients will be averaged over the ranks, as
            DistributedDataParallel does.

    Shape:
        features ``[B, d]`` or ``[B, V, d]``; clusters ``[B]`` int64; keys ``[M, d]``; key_clusters ``[M]``
        int64; weights ``[B]``. The loss is 0-dim, or ``[B]`` or ``[B, V]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = ClusteredInfoNCE(temperature=0.1)
        >>> features = torch.randn(8, 2, 16, requires_grad=True)
        >>> loss_fn(features, torch.arange(8) // 2).backward()

    Source: Tsai et al., *Learning Weakly-Supervised Contrastive Representations*, ICLR 2022, eq. 4.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        *,
        min_temperature: float = 0.01,
        positives: Positives = "out",
        normalize: bool = True,
        base_temperature: float | None = None,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        gather: Gather | Literal["none"] = "none",
        group: Group = None,
        ddp: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("temperature", temperature),
            ("min_temperature", min_temperature),
            ("base_temperature", base_temperature),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if learnable_temperature and temperature < min_temperature:
            raise ValueError(
                f"temperature: expected at least min_temperature={min_temperature}, got {temperature}"
            )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self._temperature = float(temperature)
        self.min_temperature = min_temperature
        self.positives: Positives = positives
        self.normalize = normalize
        self.base_temperature = base_temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.impl: Impl = impl
        if gather not in ("none", *get_args(Gather)):
            raise ValueError(f"gather: expected 'none', 'all', 'ring' or 'count', got {gather!r}")
        self.gather: Gather | Literal["none"] = gather
        self.group, self.ddp = group, ddp
        self._warned = False

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a tensor with a gradient where it is learnt."""
        return self._temperature if self.log_scale is None else torch.exp(-self.log_scale)

    def forward(
        self,
        features: Tensor,
        clusters: Tensor,
        keys: Tensor | None = None,
        key_clusters: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        exclude_self: bool | Tensor | None = None,
    ) -> Tensor:
        """The loss of ``features [B, d]`` or ``[B, V, d]`` with cluster ids ``clusters [B]``."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor, got {type(features).__name__}")
        if features.ndim not in (2, 3):
            raise ValueError(f"features: expected [B, d] or [B, V, d], got shape {tuple(features.shape)}")
        batch, views = features.shape[0], features.shape[1] if features.ndim == 3 else 1
        for name, value in (("clusters", clusters), ("weights", weights)):
            if value is not None and (not isinstance(value, Tensor) or value.shape != (batch,)):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected a tensor of shape ({batch},), got {got}")
        if keys is not None and key_clusters is None:
            raise ValueError("key_clusters: expected a tensor where keys is given, got None")
        queries = features.reshape(batch * views, features.shape[-1])
        if self.normalize:
            queries = nn.functional.normalize(queries, dim=-1)
            keys = None if keys is None else nn.functional.normalize(keys, dim=-1)
        if self.log_scale is not None and self.training:
            # The parameter itself is clamped: a clamped output would have no gradient to come back by.
            with torch.no_grad():
                self.log_scale.clamp_(max=-math.log(self.min_temperature))
        temperature = self.temperature
        compute: Callable[..., Tensor] = clustered_infonce
        if self.gather != "none":
            compute = partial(distributed_infonce, gather=self.gather, group=self.group, ddp=self.ddp)
        loss = compute(
            queries,
            keys,
            query_clusters=clusters.repeat_interleave(views),
            key_clusters=key_clusters,
            temperature=temperature,
            positives=self.positives,
            weights=None if weights is None else weights.repeat_interleave(views),
            ignore_index=self.ignore_index,
            exclude_self=exclude_self,
            reduction=self.reduction,
            impl=self.impl,
        )
        self._warn_without_positives(loss)
        if self.base_temperature is not None:
            loss = loss * (temperature / self.base_temperature)
        return loss.reshape(batch, views) if self.reduction == "none" and features.ndim == 3 else loss

    def _warn_without_positives(self, loss: Tensor) -> None:
        """Say once that no query had a positive: the loss is then exactly zero, and nothing is learnt."""
        if self._warned or loss.device.type != "cpu" or torch.compiler.is_compiling() or loss.numel() == 0:
            return
        if not loss.detach().any():
            self._warned = True
            warnings.warn(
                "ClusteredInfoNCE: no query of this batch had a positive key, so its loss is 0;"
                " draw batches with several samples per cluster or several views per sample",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        learnt = ", learnable_temperature=True" if self.log_scale is not None else ""
        temperature = self._temperature if self.log_scale is None else math.exp(-self.log_scale.item())
        return f"temperature={temperature:g}{learnt}, positives={self.positives!r}, impl={self.impl!r}"
