"""Embeddings ``[B, d]`` or ``[B, V, d]`` and what is known of their samples, for the loss modules."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from wscl_fast.functional._checks import check_floating, check_vector

Contrast = Literal["all", "cross"]  # which views of the batch meet


def check_features(features: object) -> Tensor:
    """The features as ``[B, V, d]``."""
    features = check_floating("features", features)
    if features.ndim not in (2, 3):
        raise ValueError(f"features: expected [B, d] or [B, V, d], got shape {tuple(features.shape)}")
    return features.unsqueeze(1) if features.ndim == 2 else features


def check_rows(name: str, value: object, batch: int, *, dimensions: tuple[int, ...] = (1,)) -> None:
    """Refuse what is not a tensor with a row for each sample."""
    # The shape is spelt out for an error alone: it would bind a traced graph to this very batch size.
    more = "," if dimensions == (1,) else ", ..."
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({batch}{more}), got {type(value).__name__}")
    if value.ndim not in dimensions or len(value) != batch:
        raise ValueError(f"{name}: expected a tensor of shape ({batch}{more}), got {tuple(value.shape)}")


def check_ids(name: str, value: object, rows: Tensor, *, other: str = "features") -> None:
    """Refuse what is not int64 for each row, beside it: under the name that the caller of a module knows.

    The functions behind the modules would refuse it too, but know it by another name.
    """
    check_rows(name, value, len(rows))
    check_vector(name, value, len(rows), rows, integer=True, other=other)


def check_across(views: Tensor, given: dict[str, object]) -> None:
    """Refuse what does not go with ``contrast="cross"``: arguments that say who meets whom, and one view."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with contrast='cross', which says who meets whom")
    if views.shape[1] < 2:
        raise ValueError(f"features: expected at least two views with contrast='cross', got {views.shape[1]}")


def others_of(views: Tensor, view: int) -> Tensor:
    """The rows of all views but this one, sample by sample, ``[B (V − 1), d]``."""
    return views[:, [other for other in range(views.shape[1]) if other != view]].flatten(0, 1)


def of_views(value: Tensor | None, views: int) -> Tensor | None:
    """A row for each view of a sample."""
    return None if value is None else value.repeat_interleave(views, 0)


def temperature_of_views(temperature: float | Tensor, batch: int, views: int) -> float | Tensor:
    """A temperature for each sample, if there is one, for each of its views."""
    if not isinstance(temperature, Tensor) or temperature.ndim == 0:
        return temperature
    if temperature.shape != (batch,):
        raise ValueError(f"temperature: expected shape () or ({batch},), got {tuple(temperature.shape)}")
    return temperature.repeat_interleave(views)
