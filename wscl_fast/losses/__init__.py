"""The losses as ``nn.Module``s, for trainers."""

from __future__ import annotations

from wscl_fast.losses.infonce import ClusteredInfoNCE

__all__ = ["ClusteredInfoNCE"]
