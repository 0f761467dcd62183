"""Weakly-supervised contrastive representation learning: fused kernels for PyTorch and a thin trainer.

Stage 1, :mod:`wscl_fast.clustering`, turns auxiliary information into cluster ids. Stage 2 learns
representations that are alike within a cluster and unlike across clusters:
:func:`wscl_fast.functional.clustered_infonce` is the loss, :class:`wscl_fast.ClusteredInfoNCE` its module.
"""

from __future__ import annotations

from wscl_fast import distributed, functional
from wscl_fast._build import BuildInfo, __version__, build_info
from wscl_fast.clustering import KMeans
from wscl_fast.functional import (
    clip_loss,
    clustered_infonce,
    hierarchical_infonce,
    siglip_loss,
    soft_infonce,
)
from wscl_fast.losses import CLIPLoss, ClusteredInfoNCE, HierarchicalInfoNCE, SigLIPLoss, SoftInfoNCE
from wscl_fast.memory import empty_reserve
from wscl_fast.queue import ClusterQueue

__all__ = [
    "BuildInfo",
    "CLIPLoss",
    "ClusterQueue",
    "ClusteredInfoNCE",
    "HierarchicalInfoNCE",
    "KMeans",
    "SigLIPLoss",
    "SoftInfoNCE",
    "__version__",
    "build_info",
    "clip_loss",
    "clustered_infonce",
    "distributed",
    "empty_reserve",
    "functional",
    "hierarchical_infonce",
    "siglip_loss",
    "soft_infonce",
]
