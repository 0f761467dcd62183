"""Weakly-supervised contrastive representation learning: fused kernels for PyTorch and a thin trainer."""

from __future__ import annotations

from wscl_fast import functional
from wscl_fast.functional import clustered_infonce
from wscl_fast.losses import ClusteredInfoNCE

__all__ = ["ClusteredInfoNCE", "clustered_infonce", "functional"]
__version__ = "0.1.0"
