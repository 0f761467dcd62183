"""The public functions over tensors, one file for each."""

from __future__ import annotations

from wscl_fast.functional.infonce import Impl, Positives, Reduction, clustered_infonce
from wscl_fast.functional.kmeans import Metric, Nearest, Update, kmeans_assign, kmeans_update

__all__ = [
    "Impl",
    "Metric",
    "Nearest",
    "Positives",
    "Reduction",
    "Update",
    "clustered_infonce",
    "kmeans_assign",
    "kmeans_update",
]
