"""The public functions over tensors, one file for each."""

from __future__ import annotations

from wscl_fast.affinity import Affinity
from wscl_fast.functional._inputs import Impl, Reduction
from wscl_fast.functional.hierarchical import Constraint, hierarchical_infonce
from wscl_fast.functional.infonce import Denominator, Positives, clustered_infonce
from wscl_fast.functional.kmeans import (
    Distances,
    Metric,
    Nearest,
    Potentials,
    Update,
    kmeans_assign,
    kmeans_distances,
    kmeans_potentials,
    kmeans_update,
)
from wscl_fast.functional.kmeans_bounds import BoundedUpdate, kmeans_update_bounded
from wscl_fast.functional.soft import conditional_factors, soft_infonce
from wscl_fast.functional.statistics import InfoNCEStats
from wscl_fast.functional.two_way import clip_loss, siglip_loss

__all__ = [
    "Affinity",
    "BoundedUpdate",
    "Constraint",
    "Denominator",
    "Distances",
    "Impl",
    "InfoNCEStats",
    "Metric",
    "Nearest",
    "Positives",
    "Potentials",
    "Reduction",
    "Update",
    "clip_loss",
    "clustered_infonce",
    "conditional_factors",
    "hierarchical_infonce",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_potentials",
    "kmeans_update",
    "kmeans_update_bounded",
    "siglip_loss",
    "soft_infonce",
]
