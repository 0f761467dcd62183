"""Clusters that exist already: a column of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wscl_fast.clustering.base import NO_CLUSTER, ClusterMethod, IdArray, Value, as_values, sorted_unique

if TYPE_CHECKING:
    from typing_extensions import Self


class IdClusters(ClusterMethod["Sequence[Any] | npt.NDArray[Any] | Tensor", IdArray]):
    """Given ids, numbered 0 … K − 1 in sorted order.

    Equals, on the samples it was fitted on, `np.unique(ids, return_inverse=True)[1]`.
    The integer −1 and None say "no cluster" and stay −1; so does an id that was not there in `fit`.

    Attributes:
        values_: the id that became cluster 0, 1, …
        n_clusters_: how many there are.
    """

    values_: list[Value]

    def fit(self, info: Sequence[Any] | npt.NDArray[Any] | Tensor) -> Self:
        """Learn which ids there are.

        Args:
            info: n ids, integers or strings.

        Raises:
            TypeError, ValueError: `info` is not a 1-D sequence of ids, or has no id at all.
        """
        values = sorted_unique(v for v in as_values(info, "info") if v is not None and v != NO_CLUSTER)
        if not values:
            raise ValueError(f"info: expected at least one id, got {len(info)} samples without any")
        self.values_ = values
        self.n_clusters_ = len(values)
        return self

    def predict(self, info: Sequence[Any] | npt.NDArray[Any] | Tensor) -> IdArray:
        """Cluster id of each sample, int64 [n]; −1 for an id that `fit` did not see."""
        self._check_fitted()
        index = {value: i for i, value in enumerate(self.values_)}
        return np.array([index.get(v, NO_CLUSTER) for v in as_values(info, "info")], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The ids, in order."""
        self._check_fitted()
        return {"method": "IdClusters", "values": list(self.values_)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described."""
        cls._check_state(state)
        self = cls()
        self.values_ = list(state["values"])
        self.n_clusters_ = len(self.values_)
        return self
