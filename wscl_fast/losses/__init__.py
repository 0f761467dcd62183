"""The losses as ``nn.Module``s, for trainers."""

from __future__ import annotations

from wscl_fast.losses.infonce import ClusteredInfoNCE
from wscl_fast.losses.known import HierarchicalInfoNCE, SoftInfoNCE
from wscl_fast.losses.two_way import CLIPLoss, SigLIPLoss

__all__ = ["CLIPLoss", "ClusteredInfoNCE", "HierarchicalInfoNCE", "SigLIPLoss", "SoftInfoNCE"]
