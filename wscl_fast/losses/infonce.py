"""Clustered InfoNCE as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from wscl_fast.distributed import Gather, first_row
from wscl_fast.distributed import clip_loss as distributed_clip
from wscl_fast.distributed import clustered_infonce as distributed_infonce
from wscl_fast.distributed.collectives import Group
from wscl_fast.distributed.shared import common
from wscl_fast.functional import (
    Denominator,
    Impl,
    InfoNCEStats,
    Positives,
    Reduction,
    clip_loss,
    clustered_infonce,
)
from wscl_fast.functional._checks import check_bool, check_choice, check_divisor, check_id
from wscl_fast.functional._inputs import row_ids
from wscl_fast.functional._variant import Variant
from wscl_fast.functional.statistics import of_views
from wscl_fast.losses._module import LossModule
from wscl_fast.losses._views import (
    Contrast,
    check_across,
    check_features,
    check_ids,
    check_rows,
    others_of,
    temperature_of_views,
)

__all__ = ["ClusteredInfoNCE"]


class ClusteredInfoNCE(LossModule):
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
        denominator: ``"all"``, ``"other"`` or ``"decoupled"``, see there.
        hardness: weight of hard negatives, see there.
        prior: the debiased loss's, see there.
        own_views: only the other views of its own sample are a query's positives; clusters then say which
            keys are no negatives under ``denominator="other"`` and ``"decoupled"``.
        contrast: which views of the batch meet. ``"all"``: all. ``"cross"``: a view meets the other views
            of the samples (its own's among them) and no key from its own place in ``V``, as two encoders or
            modalities have it.
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
        features ``[B, d]`` or ``[B, V, d]``; clusters, samples ``[B]`` int64; keys ``[M, d]``; key_clusters,
        key_samples ``[M]`` int64; weights, temperature ``[B]``. The loss is 0-dim, or ``[B]`` or ``[B, V]``
        for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss_fn = ClusteredInfoNCE(temperature=0.1)
        >>> features = torch.randn(8, 2, 16, requires_grad=True)
        >>> loss_fn(features, torch.arange(8) // 2).backward()

    Source: Tsai et al., *Learning Weakly-Supervised Contrastive Representations*, ICLR 2022, eq. 4;
    ``contrast="cross"``: Radford et al., ICML 2021 (arXiv 2103.00020), for two views.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        *,
        min_temperature: float = 0.01,
        positives: Positives = "out",
        denominator: Denominator = "all",
        hardness: float = 0.0,
        prior: float = 0.0,
        own_views: bool = False,
        contrast: Contrast = "all",
        normalize: bool = True,
        base_temperature: float | None = None,
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
        variant = Variant(positives, denominator, hardness, prior)  # refuses what is none
        check_choice("contrast", contrast, Contrast)
        if base_temperature is not None:
            base_temperature = check_divisor("base_temperature", base_temperature)
        self.positives: Positives = positives
        self.denominator: Denominator = denominator
        self.hardness, self.prior = variant.hardness, variant.prior
        self.own_views, self.contrast = check_bool("own_views", own_views), contrast
        self.base_temperature = base_temperature
        self.ignore_index = check_id("ignore_index", ignore_index)

    def forward(
        self,
        features: Tensor,
        clusters: Tensor,
        keys: Tensor | None = None,
        key_clusters: Tensor | None = None,
        *,
        samples: Tensor | None = None,
        key_samples: Tensor | None = None,
        temperature: float | Tensor | None = None,
        weights: Tensor | None = None,
        exclude_self: bool | Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """The loss of ``features [B, d]`` or ``[B, V, d]`` with cluster ids ``clusters [B]``.

        Args:
            features: the embeddings.
            clusters: ``[B]`` int64.
            keys: ``[M, d]``, what to contrast with instead of the batch.
            key_clusters: ``[M]`` int64, needed with ``keys``.
            samples: ``[B]`` int64, with ``own_views``: the index of each sample, by which its views are
                found among ``keys``. Within the batch the views of a row are one sample's by themselves.
            key_samples: ``[M]`` int64, the same of the keys.
            temperature: in place of the module's for this call: a number, or a tensor, 0-dim or ``[B]``;
                ``temperatures[clusters]`` for one of each cluster.
            weights: ``[B]``.
            exclude_self: see :func:`wscl_fast.functional.clustered_infonce`; counts rows of all views.
            return_stats: return ``(loss, stats)``, see :class:`wscl_fast.functional.InfoNCEStats`.
        """
        views = check_features(features)
        check_ids("clusters", clusters, views)
        if weights is not None:
            check_rows("weights", weights, len(views))
        if samples is not None:
            check_ids("samples", samples, views)
        return_stats = check_bool("return_stats", return_stats)
        if keys is not None and key_clusters is None:
            raise ValueError("key_clusters: expected a tensor where keys is given, got None")
        if temperature is None:
            temperature = self.clamped_temperature()
        views = self._directions("features", views)
        keys = None if keys is None else self._directions("keys", keys)
        options: dict[str, Any] = {
            "positives": self.positives,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "impl": self.impl,
            **self._options(),
            **({"return_stats": True} if return_stats else {}),
        }
        samples = self._samples(clusters, samples, keys, key_samples)
        rows = _Rows(views, clusters, samples, weights, temperature)
        if self.contrast == "cross":
            given = {"key_clusters": key_clusters, "key_samples": key_samples}
            check_across(views, {"keys": keys, "exclude_self": exclude_self, **given})
            loss = self._cross(rows, options)
        else:
            loss = self._compute(options)(
                views.flatten(0, 1),
                keys,
                key_clusters=key_clusters,
                exclude_self=exclude_self,
                **({} if samples is None else {"key_samples": key_samples}),
                **rows.repeated(views.shape[1]),
            )
        stats: InfoNCEStats | None = None
        if return_stats:
            loss, stats = loss
        self._warn_without_positives(loss)
        if self.base_temperature is not None:
            if isinstance(temperature, Tensor) and temperature.ndim:
                raise ValueError("temperature: expected one number where base_temperature is given")
            factor = temperature / self.base_temperature
            if isinstance(factor, Tensor) and self.gather != "none":
                factor = common(factor, self.reduction, self.group, ddp=self.ddp)
            loss = loss * factor
        if self.reduction == "none":
            loss = loss.reshape(features.shape[:-1])
        return loss if stats is None else (loss, stats)

    def _options(self) -> dict[str, Any]:
        """What is not as it is by default."""
        chosen = {"denominator": self.denominator, "hardness": self.hardness, "prior": self.prior}
        return {name: value for name, value in chosen.items() if value not in ("all", 0)}

    def _samples(
        self, clusters: Tensor, samples: Tensor | None, keys: Tensor | None, key_samples: Tensor | None
    ) -> Tensor | None:
        """The samples' indices where they say who is positive."""
        if not self.own_views:
            for name, value in (("samples", samples), ("key_samples", key_samples)):
                if value is not None:
                    raise ValueError(f"{name}: expected None without own_views=True, got a tensor")
            return None
        if keys is not None and (samples is None or key_samples is None):
            missing = "samples" if samples is None else "key_samples"
            raise ValueError(f"{missing}: expected a tensor where keys is given with own_views, got None")
        if samples is None:
            start = 0 if self.gather == "none" else first_row(clusters, self.group)
            samples = row_ids(clusters, self.ignore_index, start)
        return samples

    def _compute(self, options: dict[str, Any]) -> Callable[..., Any]:
        return partial(self._choose(clustered_infonce, distributed_infonce), **options)

    def _cross(self, rows: _Rows, options: dict[str, Any]) -> Any:
        """Each view against all others. All have the same anchors, so that the mean is the views' mean."""
        views = rows.views
        count = views.shape[1]
        compute = self._compute(options)
        plain = rows.samples is None and set(options) == {"positives", "ignore_index", "reduction", "impl"}
        of_each = isinstance(rows.temperature, Tensor) and rows.temperature.ndim > 0
        if count == 2 and plain and self.gather != "count" and not of_each:
            loss = self._choose(clip_loss, distributed_clip)(  # one similarity matrix for both views
                views[:, 0],
                views[:, 1],
                x_clusters=rows.clusters,
                x_weights=rows.weights,
                y_weights=rows.weights,
                temperature=rows.temperature,
                **options,
            )
            if self.reduction == "none":
                return loss.view(2, -1).T
            return loss if self.reduction == "mean" else 2 * loss
        results = []
        for view in range(count):
            arguments = rows.repeated(1)
            if rows.samples is not None:
                arguments["key_samples"] = rows.samples.repeat_interleave(count - 1)
            results.append(
                compute(
                    views[:, view],
                    others_of(views, view),
                    key_clusters=rows.clusters.repeat_interleave(count - 1),
                    **arguments,
                )
            )
        losses, stats = zip(*results, strict=True) if "return_stats" in options else (results, None)
        loss = torch.stack(losses, -1)
        if self.reduction != "none":
            loss = loss.mean() if self.reduction == "mean" else loss.sum()
        return loss if stats is None else (loss, of_views(stats))

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.describe_temperature()}, positives={self.positives!r}, impl={self.impl!r}"


class _Rows:
    """A batch's views, and what is known of its samples."""

    def __init__(
        self,
        views: Tensor,  # [B, V, d]
        clusters: Tensor,
        samples: Tensor | None,
        weights: Tensor | None,
        temperature: float | Tensor,
    ) -> None:
        self.views, self.clusters, self.samples = views, clusters, samples
        self.weights, self.temperature = weights, temperature

    def repeated(self, times: int) -> dict[str, Any]:
        """The arguments that say something of a query, each sample's ``times`` over."""
        temperature = temperature_of_views(self.temperature, len(self.clusters), times)
        arguments = {"query_clusters": self.clusters.repeat_interleave(times), "temperature": temperature}
        if self.samples is not None:
            arguments["query_samples"] = self.samples.repeat_interleave(times)
        if self.weights is not None:
            arguments["weights"] = self.weights.repeat_interleave(times)
        return arguments
