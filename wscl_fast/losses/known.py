"""Losses that know more of a sample than one cluster: levels of clusters, tags, vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from wscl_fast.distributed import Gather
from wscl_fast.distributed import hierarchical_infonce as distributed_hierarchical
from wscl_fast.distributed import soft_infonce as distributed_soft
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional import (
    Affinity,
    Constraint,
    Impl,
    Positives,
    Reduction,
    hierarchical_infonce,
    soft_infonce,
)
from wscl_fast.functional._checks import check_choice, check_device, check_id
from wscl_fast.functional.hierarchical import Levels, check_levels
from wscl_fast.functional.soft import check_auxiliary
from wscl_fast.losses._module import LossModule
from wscl_fast.losses._views import (
    Contrast,
    check_across,
    check_features,
    check_rows,
    of_views,
    others_of,
    temperature_of_views,
)

__all__ = ["HierarchicalInfoNCE", "SoftInfoNCE"]


class _OfViews(LossModule):
    """What both have in common: views as rows of one batch, or each view against the others."""

    positives: Positives
    contrast: Contrast

    def _over_views(
        self,
        compute: Callable[..., Any],
        features: Tensor,
        known: tuple[str, Tensor, Tensor | None],  # by its name, of the samples and of keys
        keys: Tensor | None,
        weights: Tensor | None,
        temperature: float | Tensor | None,
        exclude_self: bool | Tensor | None,
    ) -> Tensor:
        """The loss, ``[B, V, ...]`` where it is not reduced."""
        name, of_samples, of_keys = known
        views = check_features(features)
        batch, count = views.shape[:2]
        if weights is not None:
            check_rows("weights", weights, batch)
        views = self._directions("features", views)
        if keys is not None and of_keys is None and self.contrast == "all":  # as many as rows would pass
            raise ValueError(f"key_{name}: expected a tensor where keys is given, got None")
        keys = None if keys is None else self._directions("keys", keys)
        temperature = self.clamped_temperature() if temperature is None else temperature
        compute = partial(compute, positives=self.positives, reduction=self.reduction, impl=self.impl)
        if self.contrast == "all":
            loss: Tensor = compute(
                views.flatten(0, 1),
                keys,
                **{f"query_{name}": of_views(of_samples, count), f"key_{name}": of_keys},
                weights=of_views(weights, count),
                temperature=temperature_of_views(temperature, batch, count),
                exclude_self=exclude_self,
            )
            return loss.view(batch, count, *loss.shape[1:]) if self.reduction == "none" else loss
        check_across(views, {"keys": keys, "exclude_self": exclude_self, f"key_{name}": of_keys})
        of_others = of_views(of_samples, count - 1)
        each = [
            compute(
                views[:, view],
                others_of(views, view),
                **{f"query_{name}": of_samples, f"key_{name}": of_others},
                weights=weights,
                temperature=temperature_of_views(temperature, batch, 1),
            )
            for view in range(count)
        ]
        if self.reduction == "none":
            return torch.stack(each, 1)
        return torch.stack(each).mean() if self.reduction == "mean" else torch.stack(each).sum()


class HierarchicalInfoNCE(_OfViews):
    """Clustered InfoNCE over several levels of clusters, of one or several views of each sample.

    In plain PyTorch, for ``features [B, V, d]``::

        x = F.normalize(features, dim=-1).flatten(0, 1)
        loss = hierarchical_infonce(x, query_clusters=clusters.repeat_interleave(V, 0))

    Args:
        temperature: positive; the starting value where it is learnt.
        learnable_temperature, min_temperature: as in :class:`wscl_fast.ClusteredInfoNCE`.
        level_weights: a weight for each level, the coarsest first; by default 1 / levels each.
        constraint: ``"none"``, ``"level"`` or ``"pair"``, see
            :func:`wscl_fast.functional.hierarchical_infonce`.
        positives, normalize, reduction, impl: as in :class:`wscl_fast.ClusteredInfoNCE`.
        contrast: as there; the loss of ``"cross"`` is the mean (or sum) of each view's against the others.
        gather, group, ddp: for the loss over the batch of all ranks, as there; ``gather="none"`` for this
            process alone.
        ignore_index: the cluster id that says "no cluster at this level".

    Shape:
        features ``[B, d]`` or ``[B, V, d]``; clusters ``[B, L]`` int64; keys ``[M, d]``; key_clusters
        ``[M, L]`` int64; weights, temperature ``[B]``. The loss is 0-dim, or ``[B V, L]`` for
        ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = HierarchicalInfoNCE(0.1, level_weights=[0.5, 1.0])
        >>> breeds = torch.arange(8) // 2
        >>> loss = loss_fn(torch.randn(8, 2, 16), torch.stack([breeds // 2, breeds], 1))

    Source: Zhang et al., *Use All The Labels*, CVPR 2022 (arXiv 2204.13207).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        *,
        min_temperature: float = 0.01,
        level_weights: Sequence[float] | Tensor | None = None,
        constraint: Constraint = "none",
        positives: Positives = "out",
        contrast: Contrast = "all",
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
        levels = Levels(positives, constraint, level_weights)  # refuses what is none
        check_choice("contrast", contrast, Contrast)
        self.positives, self.contrast = positives, contrast
        self.constraint, self.level_weights = constraint, levels.weights
        self.ignore_index = check_id("ignore_index", ignore_index)

    def forward(
        self,
        features: Tensor,
        clusters: Tensor,
        keys: Tensor | None = None,
        key_clusters: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        weights: Tensor | None = None,
        exclude_self: bool | Tensor | None = None,
    ) -> Tensor:
        """The loss of ``features [B, d]`` or ``[B, V, d]`` with cluster ids ``clusters [B, L]``.

        Args:
            features: the embeddings.
            clusters: ``[B, L]`` int64, the coarsest level first.
            keys: ``[M, d]``, what to contrast with instead of the batch.
            key_clusters: ``[M, L]`` int64, needed with ``keys``.
            temperature: in place of the module's for this call: a number, or a tensor, 0-dim or ``[B]``.
            weights: ``[B]``.
            exclude_self: see :func:`wscl_fast.functional.clustered_infonce`; counts rows of all views.
        """
        views = check_features(features)
        check_rows("clusters", clusters, len(views), dimensions=(2,))
        check_levels("clusters", clusters)
        check_device("clusters", clusters, views, other="features")
        compute = partial(
            self._choose(hierarchical_infonce, distributed_hierarchical),
            level_weights=self.level_weights,
            constraint=self.constraint,
            ignore_index=self.ignore_index,
        )
        known = "clusters", clusters, key_clusters
        loss = self._over_views(compute, features, known, keys, weights, temperature, exclude_self)
        self._warn_without_positives(loss)
        return loss.flatten(0, 1) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.describe_temperature()}, constraint={self.constraint!r}, positives={self.positives!r}"


class SoftInfoNCE(_OfViews):
    """InfoNCE whose positives are weighed by common tags or by a kernel of auxiliary vectors.

    In plain PyTorch, for ``features [B, V, d]``::

        x = F.normalize(features, dim=-1).flatten(0, 1)
        loss = soft_infonce(x, query_auxiliary=auxiliary.repeat_interleave(V, 0), affinity=affinity)

    A view's positives are the other views of its own sample too, with the affinity that the sample has with
    itself.

    Args:
        affinity: ``"shared"``, ``"count"``, ``"jaccard"`` or ``"cosine"`` of tag sets, or ``"kernel"`` of
            vectors, see :func:`wscl_fast.functional.soft_infonce`.
        temperature: positive; the starting value where it is learnt.
        learnable_temperature, min_temperature: as in :class:`wscl_fast.ClusteredInfoNCE`.
        positives, normalize, reduction, impl: as in :class:`wscl_fast.ClusteredInfoNCE`.
        contrast: as there; the loss of ``"cross"`` is the mean (or sum) of each view's against the others.
        gather, group, ddp: for the loss over the batch of all ranks, as there; ``gather="none"`` for this
            process alone.

    Shape:
        features ``[B, d]`` or ``[B, V, d]``; auxiliary ``[B]`` or ``[B, words]`` int64 bit masks, or
        ``[B, r]`` floating point for a kernel; keys ``[M, d]``; key_auxiliary the same of the keys;
        key_valid ``[M]`` bool; weights, temperature ``[B]``. The loss is 0-dim, or ``[B]`` or ``[B, V]`` for
        ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = SoftInfoNCE("jaccard", temperature=0.1)
        >>> tags = torch.tensor([0b0011, 0b0110, 0b1000, 0b1100])
        >>> loss = loss_fn(torch.randn(4, 2, 16), tags)

    Source: Dufumier et al., MICCAI 2021 (arXiv 2106.08808); Tsai et al., ICLR 2022 (arXiv 2202.05458).
    """

    def __init__(
        self,
        affinity: Affinity,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        *,
        min_temperature: float = 0.01,
        positives: Positives = "out",
        contrast: Contrast = "all",
        normalize: bool = True,
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
        check_choice("affinity", affinity, Affinity)
        check_choice("positives", positives, Positives)
        check_choice("contrast", contrast, Contrast)
        self.affinity: Affinity = affinity
        self.positives, self.contrast = positives, contrast

    def forward(
        self,
        features: Tensor,
        auxiliary: Tensor,
        keys: Tensor | None = None,
        key_auxiliary: Tensor | None = None,
        *,
        key_valid: Tensor | None = None,
        temperature: float | Tensor | None = None,
        weights: Tensor | None = None,
        exclude_self: bool | Tensor | None = None,
    ) -> Tensor:
        """The loss of ``features [B, d]`` or ``[B, V, d]`` whose samples are known by ``auxiliary``.

        Args:
            features: the embeddings.
            auxiliary: the samples' tags, ``[B]`` or ``[B, words]`` int64 bit masks, or their vectors
                ``[B, r]`` for a kernel.
            keys: ``[M, d]``, what to contrast with instead of the batch.
            key_auxiliary: the same of the keys, needed with ``keys``.
            key_valid: ``[M]`` bool, with ``keys``: False for a key that no one meets (an empty slot of a
                queue).
            temperature: in place of the module's for this call: a number, or a tensor, 0-dim or ``[B]``.
            weights: ``[B]``.
            exclude_self: see :func:`wscl_fast.functional.clustered_infonce`; counts rows of all views.
        """
        views = check_features(features)
        check_rows("auxiliary", auxiliary, len(views), dimensions=(1, 2))
        check_device(
            "auxiliary", check_auxiliary("auxiliary", auxiliary, self.affinity), views, other="features"
        )
        if keys is None and key_valid is not None:
            raise ValueError("key_valid: expected None where keys is None, got a tensor")
        compute = partial(
            self._choose(soft_infonce, distributed_soft), affinity=self.affinity, key_valid=key_valid
        )
        known = "auxiliary", auxiliary, key_auxiliary
        loss = self._over_views(compute, features, known, keys, weights, temperature, exclude_self)
        self._warn_without_positives(loss)
        return loss.reshape(features.shape[:-1]) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"affinity={self.affinity!r}, {self.describe_temperature()}, positives={self.positives!r}"
