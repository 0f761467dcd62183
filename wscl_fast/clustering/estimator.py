"""scikit-learn's estimator contract by duck typing: works in its pipelines, needs none of it."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Self


class NotFittedError(RuntimeError, ValueError, AttributeError):
    """An estimator was used before `fit`; scikit-learn's class of this name too, where that is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _not_fitted, self.args  # the class may be made anew where it is unpickled


def not_fitted(estimator: object) -> NotFittedError:
    """The error to raise when `estimator` is used before `fit`."""
    return _not_fitted(f"{type(estimator).__name__} is not fitted: call fit first")


def _not_fitted(*args: object) -> NotFittedError:
    kind: type[NotFittedError] = NotFittedError
    theirs = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", None)
    if theirs is not None:
        kind = type("NotFittedError", (NotFittedError, theirs), {})
    return kind(*args)


class Estimator:
    """Parameters by the names in `__init__`, a repr that shows those that were set, tags, feature names."""

    n_features_in_: int

    @classmethod
    def _parameters(cls) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p for name, p in sorted(parameters.items()) if name != "self"}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What `__init__` was given, by name."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any) -> Self:
        """Change what `__init__` was given; checked by the next `fit`.

        Raises:
            ValueError: no parameter of that name.
        """
        known = self._parameters()
        for name, value in params.items():
            if name not in known:
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {list(known)}."
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = []
        for name, parameter in self._parameters().items():
            value = getattr(self, name, parameter.default)
            if not (value is parameter.default or repr(value) == repr(parameter.default)):
                short = f"array of shape {list(value.shape)}" if hasattr(value, "shape") else repr(value)
                shown.append(f"{name}={short}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def _take_columns(self, X: Any, width: int) -> None:
        """Remember how many columns `fit` saw, and their names where they have names."""
        self.n_features_in_ = width
        names = _column_names(X)
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _check_columns(self, X: Any, width: int) -> None:
        """Refuse samples with other columns than `fit` saw."""
        if width != self.n_features_in_:
            raise ValueError(
                f"X has {width} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        names, fitted = _column_names(X), getattr(self, "feature_names_in_", None)
        if names is not None and fitted is not None and not np.array_equal(names, fitted):
            raise ValueError(
                f"X: the feature names should match those that were passed during fit, {list(fitted)}, "
                f"got {list(names)}"
            )


def _column_names(X: Any) -> Any:
    """The names of a data frame's columns as an array of objects, or None where X has none."""
    columns = getattr(X, "columns", None)
    if columns is None or not all(isinstance(name, str) for name in columns):
        return None
    return np.asarray(list(columns), dtype=object)
