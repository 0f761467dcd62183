"""What every clustering of stage 1 offers, and how plain values are read from what a user passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wscl_fast.functional._checks import check_number

if TYPE_CHECKING:
    from typing_extensions import Self

IdArray: TypeAlias = npt.NDArray[np.int64]
Value: TypeAlias = str | int | float | bool | None

Info = TypeVar("Info")
Ids = TypeVar("Ids")

NO_CLUSTER = -1


class ClusterMethod(ABC, Generic[Info, Ids]):
    """Turns the auxiliary information of samples into cluster ids `0 … n_clusters_ − 1`.

    A method is fitted on the training split only; any other sample is assigned with what was fitted,
    and gets −1 where that says nothing about it.
    """

    n_clusters_: int

    @abstractmethod
    def fit(self, info: Info) -> Self:
        """Learn the clusters from the training samples."""

    @abstractmethod
    def predict(self, info: Info) -> Ids:
        """Cluster id of each sample, int64 [n], −1 where it has none."""

    def fit_predict(self, info: Info) -> Ids:
        """`fit(info).predict(info)`."""
        return self.fit(info).predict(info)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything `predict` needs: scalars, strings, lists and numpy arrays."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_clusters_"):
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit first")

    @classmethod
    def _check_state(cls, state: Mapping[str, Any]) -> None:
        check_mapping(state, "state")
        if state.get("method") != cls.__name__:
            raise ValueError(f"state: expected one of {cls.__name__}, got method={state.get('method')!r}")


def check_count(value: object, name: str, *, least: int = 1, most: int | None = None) -> int:
    """The argument `name` as an int that is at least `least`, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return int(value)


def check_least(value: object, name: str, least: float) -> float:
    """The argument `name` as a finite number that is at least `least`."""
    number = check_number(name, value)
    if not least <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")
    return number


def check_mapping(value: object, name: str, of: str = "") -> None:
    """Refuse an argument `name` that is no mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping{of}, got {type(value).__name__}")


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Refuse an argument `name` that is none of the choices."""
    if not isinstance(value, str) or value not in choices:  # an array would compare element by element
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_enough(n_clusters: int, n_samples: int, n_zero: int) -> None:
    """Refuse more clusters than samples, of which `n_zero` have no direction to be clustered by."""
    usable = n_samples - n_zero
    if usable < n_clusters:
        what = "samples that are not zero" if n_zero else "samples"
        raise ValueError(f"n_clusters: expected at most the {usable} {what}, got {n_clusters}")


def as_values(column: Sequence[Any] | npt.NDArray[Any] | Tensor, name: str) -> list[Value]:
    """A column as a list of plain values, one per sample, which JSON can hold."""
    if isinstance(column, np.ndarray | Tensor):
        if column.ndim != 1:
            raise ValueError(f"{name}: expected one value per sample (1-D), got {column.ndim} dimensions")
        values = column.tolist()
    elif isinstance(column, Sequence) and not isinstance(column, str | bytes):
        values = list(column)
    else:
        raise TypeError(f"{name}: expected a sequence with one value per sample, got {type(column).__name__}")
    values = [v.item() if isinstance(v, np.generic) else v for v in values]
    for row, value in enumerate(values):
        if not (value is None or isinstance(value, str | int | float)):
            raise TypeError(f"{name}[{row}]: expected a string or a number, got {type(value).__name__}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name}[{row}]: NaN equals nothing, itself included; name the missing value")
    return values


def as_string_lists(info: Sequence[Sequence[str]], name: str) -> list[list[str]]:
    """One list of strings per sample; a bare string, which is a sequence too, is refused."""
    if isinstance(info, str) or not isinstance(info, Sequence | np.ndarray):
        raise TypeError(f"{name}: expected a sequence with one list per sample, got {type(info).__name__}")
    if getattr(info, "ndim", 1) == 0:
        raise ValueError(f"{name}: expected one list per sample, got an array of 0 dimensions")
    lists: list[list[str]] = []
    for row, entry in enumerate(info):
        if isinstance(entry, str) or not isinstance(entry, Iterable):
            raise TypeError(f"{name}[{row}]: expected a list of strings, got {type(entry).__name__}")
        strings = list(entry)
        for value in strings:
            if not isinstance(value, str):
                raise TypeError(f"{name}[{row}]: expected strings, got {type(value).__name__}")
        lists.append(strings)
    return lists


def sorted_unique(values: Iterable[Value]) -> list[Value]:
    """The distinct values in an order that does not depend on the order of the samples."""
    # The type comes first so that None, numbers and strings may meet in one column.
    return sorted(set(values), key=lambda v: (v is not None, isinstance(v, str), v))
