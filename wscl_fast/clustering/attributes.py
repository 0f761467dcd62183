"""Clusters from discrete attributes: the joint value of the most informative ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wscl_fast.clustering.base import (
    NO_CLUSTER,
    ClusterMethod,
    IdArray,
    Value,
    as_values,
    check_count,
    check_mapping,
    sorted_unique,
)
from wscl_fast.clustering.diagnostics import entropy

if TYPE_CHECKING:
    from typing_extensions import Self

Attributes: TypeAlias = Mapping[str, Sequence[Any] | npt.NDArray[Any]]


class AttributeClusters(ClusterMethod[Attributes, IdArray]):
    """Samples that agree on the `top_k` attributes of highest entropy belong together.

    Equals `np.unique(chosen_columns, axis=0, return_inverse=True)[1]` on the training samples. The more
    attributes, the finer the clusters. A joint value that `fit` did not see gets −1. Every value counts as
    it is, None and −1 included: an attribute that is missing is a value like any other.

    Source: Tsai et al., ICLR 2022, arXiv 2202.06670, section 4.1 (top-k attributes by entropy).

    Args:
        top_k: how many attributes to join; None takes all. Of two attributes of equal entropy the one
            that comes first in `info` wins.

    Attributes:
        entropies_: every attribute's entropy in bits on the training samples.
        columns_: the chosen attributes, highest entropy first.
        values_: for each chosen attribute, its values in the order of their codes.
        joint_: int64 [n_clusters_, k], the codes that make up each cluster.
        n_clusters_: how many there are.
    """

    entropies_: dict[str, float]
    columns_: list[str]
    values_: list[list[Value]]
    joint_: IdArray

    def __init__(self, top_k: int | None = None) -> None:
        self.top_k = None if top_k is None else check_count(top_k, "top_k")

    def fit(self, info: Attributes) -> Self:
        """Choose the attributes and number their joint values.

        Args:
            info: column name -> n values (strings or numbers), all columns of one length.

        Raises:
            TypeError: `info` is not a mapping of columns to plain values.
            ValueError: no column, no sample, columns of different lengths, or fewer columns than `top_k`.
        """
        check_mapping(info, "info", " of columns to values")
        if not info:
            raise ValueError("info: expected at least one attribute, got none")
        if self.top_k is not None and self.top_k > len(info):
            raise ValueError(f"top_k: expected at most the {len(info)} attributes given, got {self.top_k}")
        columns = _columns(info, list(info))
        if not len(next(iter(columns.values()))):
            raise ValueError("info: expected at least one sample, got none")

        values = {name: sorted_unique(column) for name, column in columns.items()}
        codes = {name: _encode(column, values[name]) for name, column in columns.items()}
        self.entropies_ = {name: entropy(np.bincount(code)) for name, code in codes.items()}
        self.columns_ = sorted(info, key=lambda name: -self.entropies_[name])[: self.top_k]
        self.values_ = [values[name] for name in self.columns_]
        self.joint_ = np.unique(np.stack([codes[name] for name in self.columns_], axis=1), axis=0)
        self.n_clusters_ = len(self.joint_)
        return self

    def predict(self, info: Attributes) -> IdArray:
        """Cluster id of each sample, int64 [n]; −1 for an unseen joint value.

        Reads the chosen columns only.
        """
        self._check_fitted()
        check_mapping(info, "info", " of columns to values")
        missing = [name for name in self.columns_ if name not in info]
        if missing:
            raise ValueError(f"info: expected the columns {self.columns_}, got none named {missing[0]!r}")
        columns = _columns(info, self.columns_)
        codes = [
            _encode(columns[name], values) for name, values in zip(self.columns_, self.values_, strict=True)
        ]
        index = {tuple(row): i for i, row in enumerate(self.joint_.tolist())}
        rows = np.stack(codes, axis=1).tolist()
        return np.array([index.get(tuple(row), NO_CLUSTER) for row in rows], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The chosen attributes, their values and the joint values, in order."""
        self._check_fitted()
        return {
            "method": "AttributeClusters",
            "top_k": self.top_k,
            "entropies": dict(self.entropies_),
            "columns": list(self.columns_),
            "values": [list(values) for values in self.values_],
            "joint": self.joint_.copy(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described."""
        cls._check_state(state)
        self = cls(state["top_k"])
        self.entropies_ = dict(state["entropies"])
        self.columns_ = list(state["columns"])
        self.values_ = [list(values) for values in state["values"]]
        self.joint_ = np.asarray(state["joint"], dtype=np.int64)
        self.n_clusters_ = len(self.joint_)
        return self


def _columns(info: Attributes, names: list[str]) -> dict[str, list[Value]]:
    columns = {name: as_values(info[name], f"info[{name!r}]") for name in names}
    length = len(columns[names[0]])
    for name, column in columns.items():
        if len(column) != length:
            raise ValueError(
                f"info[{name!r}]: expected {length} values as in {names[0]!r}, got {len(column)}"
            )
    return columns


def _encode(column: list[Value], values: list[Value]) -> IdArray:
    code = {value: i for i, value in enumerate(values)}
    return np.array([code.get(value, NO_CLUSTER) for value in column], dtype=np.int64)
