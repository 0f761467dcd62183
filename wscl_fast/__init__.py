"""Weakly-supervised contrastive representation learning: fused kernels for PyTorch and a thin trainer.

Stage 1, :mod:`wscl_fast.clustering`, turns auxiliary information into cluster ids. Stage 2 learns
representations that are alike within a cluster and unlike across clusters:
:func:`wscl_fast.functional.clustered_infonce` is the loss, :class:`wscl_fast.ClusteredInfoNCE` its module.
"""

from __future__ import annotations

from wscl_fast import distributed, functional
from wscl_fast._build import BuildInfo, __version__, build_info
from wscl_fast.clustering import KMeans
from wscl_fast.functional import clustered_infonce
from wscl_fast.losses import ClusteredInfoNCE
from wscl_fast.queue import ClusterQueue

__all__ = [
    "BuildInfo",
    "ClusterQueue",
    "ClusteredInfoNCE",
    "KMeans",
    "__version__",
    "build_info",
    "clustered_infonce",
    "distributed",
    "functional",
]
