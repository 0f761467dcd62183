"""Embeddings ``[B, d]`` or ``[B, V, d]`` and what is known of their samples, for the loss modules."""

from __future__ import annotations

from torch import Tensor

from wscl_fast.functional._checks import check_floating


def check_features(features: object) -> Tensor:
    """The features as ``[B, V, d]``."""
    features = check_floating("features", features)
    if features.ndim not in (2, 3):
        raise ValueError(f"features: expected [B, d] or [B, V, d], got shape {tuple(features.shape)}")
    return features.unsqueeze(1) if features.ndim == 2 else features


def check_rows(name: str, value: object, batch: int, *, dimensions: tuple[int, ...] = (1,)) -> None:
    """Refuse what is not a tensor with a row for each sample."""
    shape = f"({batch},)" if dimensions == (1,) else f"({batch}, ...)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(value).__name__}")
    if value.ndim not in dimensions or len(value) != batch:
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {tuple(value.shape)}")


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
