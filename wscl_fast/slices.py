"""A range in pieces."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["slices"]


def slices(stop: int, step: int) -> Iterator[slice]:
    """So many at a time, at least one piece: an empty one keeps the graph of gradients whole."""
    if stop <= step:  # no number of pieces, which would bind a traced graph to this very size
        return iter((slice(0, stop),))
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))
