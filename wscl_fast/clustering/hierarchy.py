"""Clusters from a hierarchy: the nodes of a tree, cut at one level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wscl_fast.clustering.base import NO_CLUSTER, ClusterMethod, IdArray, as_string_lists, check_count

if TYPE_CHECKING:
    from typing_extensions import Self


class HierarchyClusters(ClusterMethod[Sequence[Sequence[str]], IdArray]):
    """Samples under one node of a tree belong together.

    Equals a numbering of `path[:level]`. Two nodes of one name under different parents are different
    clusters. A path that ends above the cut stands for its deepest node, a cluster of its own; an empty
    path says nothing and gets −1, as does a node that `fit` did not see.

    Source: Tsai et al., ICLR 2022, arXiv 2202.06670 (the data's hierarchy as auxiliary information).

    Args:
        level: depth of the cut; 1 is the top.

    Attributes:
        nodes_: the path of cluster 0, 1, …
        n_clusters_: how many there are.
    """

    nodes_: list[tuple[str, ...]]

    def __init__(self, level: int = 1) -> None:
        self.level = check_count(level, "level")

    def fit(self, info: Sequence[Sequence[str]]) -> Self:
        """Learn which nodes there are at the cut.

        Args:
            info: one path per sample, from the root down.

        Raises:
            TypeError: `info` is not a sequence of lists of strings.
            ValueError: there is no sample, or every path is empty.
        """
        nodes = set(self._cut(info)) - {()}
        if not nodes:
            raise ValueError("info: expected at least one path that is not empty, got none")
        self.nodes_ = sorted(nodes)
        self.n_clusters_ = len(nodes)
        return self

    def predict(self, info: Sequence[Sequence[str]]) -> IdArray:
        """Cluster id of each sample, int64 [n]; −1 for an unseen node."""
        self._check_fitted()
        index = {node: i for i, node in enumerate(self.nodes_)}
        return np.array([index.get(node, NO_CLUSTER) for node in self._cut(info)], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The level and the nodes, in order."""
        self._check_fitted()
        return {
            "method": "HierarchyClusters",
            "level": self.level,
            "nodes": [list(node) for node in self.nodes_],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described."""
        cls._check_state(state)
        self = cls(int(state["level"]))
        self.nodes_ = [tuple(node) for node in state["nodes"]]
        self.n_clusters_ = len(self.nodes_)
        return self

    def _cut(self, info: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
        return [tuple(path[: self.level]) for path in as_string_lists(info, "info")]
