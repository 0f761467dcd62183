"""Stage 1: cluster ids out of auxiliary information, and how good they are.

Each method has `fit`, `predict`, `fit_predict` and `n_clusters_`, and is fitted on the training split. Those
of tags, attributes, hierarchies and ids give −1 to a sample that they know nothing about; k-means gives every
sample a cluster. All but `BisectingKMeans` and `HierarchicalKMeans`, which pickle keeps, have `state_dict`
and `from_state_dict` (:class:`ClusterMethod`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wscl_fast.clustering.attributes import AttributeClusters
from wscl_fast.clustering.balanced import BalancedKMeans
from wscl_fast.clustering.base import NO_CLUSTER, ClusterMethod, check_mapping
from wscl_fast.clustering.bisecting import BisectingKMeans
from wscl_fast.clustering.diagnostics import ClusterReport, diagnose, entropy
from wscl_fast.clustering.files import FeatureFiles
from wscl_fast.clustering.hierarchical_kmeans import HierarchicalKMeans
from wscl_fast.clustering.hierarchy import HierarchyClusters
from wscl_fast.clustering.ids import IdClusters
from wscl_fast.clustering.kmeans import KMeans
from wscl_fast.clustering.matching import match_clusters
from wscl_fast.clustering.scheduler import ClusterScheduler, Level
from wscl_fast.clustering.tags import TagClusters

__all__ = [
    "NO_CLUSTER",
    "AttributeClusters",
    "BalancedKMeans",
    "BisectingKMeans",
    "ClusterMethod",
    "ClusterReport",
    "ClusterScheduler",
    "FeatureFiles",
    "HierarchicalKMeans",
    "HierarchyClusters",
    "IdClusters",
    "KMeans",
    "Level",
    "TagClusters",
    "diagnose",
    "entropy",
    "match_clusters",
    "method_from_state_dict",
]

_METHODS: tuple[type[ClusterMethod[Any, Any]], ...] = (
    AttributeClusters,
    BalancedKMeans,
    HierarchyClusters,
    IdClusters,
    KMeans,
    TagClusters,
)


def method_from_state_dict(state: Mapping[str, Any]) -> ClusterMethod[Any, Any]:
    """The fitted method that a `state_dict` describes, whichever it is.

    Args:
        state: what a method's `state_dict` gave.

    Raises:
        TypeError: `state` is no mapping.
        ValueError: `state["method"]` names no method, or an entry that the method needs is missing.
    """
    check_mapping(state, "state")
    for method in _METHODS:
        if state.get("method") == method.__name__:
            try:
                return method.from_state_dict(state)
            except KeyError as error:
                raise ValueError(
                    f"state: expected an entry {error} of {method.__name__}, got none"
                ) from error
    names = [method.__name__ for method in _METHODS]
    raise ValueError(f"state: expected a method of {names}, got {state.get('method')!r}")
