"""What a data set is to the rest of the package: pictures, their split, auxiliary information, labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageDataset:
    """Pictures with their split, their auxiliary information (any of four kinds) and their labels.

    Auxiliary information (``tags``, ``attributes``, ``hierarchy``, ``clusters``) is what training may use;
    ``labels`` are for evaluation alone (and for the supervised ceiling, which says so).

    Attributes:
        name: short name of the data set.
        images: uint8 [n, 3, H, W], possibly memory-mapped read-only.
        keys: one per sample; the path in the table, or the emoji's code points.
        split: str [n], each one of "train", "val", "test".
        labels: column -> int64 [n]; −1 where unknown.
        label_names: column -> names, indexed by the values of ``labels``.
        tags: the words given to each sample, lower-case, in order, none twice.
        attributes: column -> str [n]; "" where the value is missing.
        hierarchy: the path from the root to each sample's node.
        clusters: ids that came with the data [n], strings or integers.
        groups: int64 [n]; samples of one group are variants of one thing, so that a part held out to choose a
            setting has to take whole groups. None where every sample stands for itself.
        attribution: licence and source; "" for a user's own folder.
        n_skipped: rows that were left out because they could not be used.
    """

    name: str
    images: NDArray[np.uint8]
    keys: list[str]
    split: NDArray[np.str_]
    labels: dict[str, NDArray[np.int64]]
    label_names: dict[str, list[str]]
    tags: list[tuple[str, ...]] | None = None
    attributes: dict[str, NDArray[np.str_]] | None = None
    hierarchy: list[tuple[str, ...]] | None = None
    clusters: NDArray[np.str_] | NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    attribution: str = ""
    n_skipped: int = 0

    def __post_init__(self) -> None:
        n = len(self.keys)
        if not isinstance(self.images, np.ndarray):
            raise TypeError(f"images: expected a numpy array, got {type(self.images).__name__}")
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images: expected uint8 [n, 3, H, W], got {self.images.dtype} {self.images.shape}"
            )
        lengths = {"images": len(self.images), "split": len(self.split)}
        lengths |= {f"labels[{column!r}]": len(values) for column, values in self.labels.items()}
        lengths |= {
            f"attributes[{column!r}]": len(values) for column, values in (self.attributes or {}).items()
        }
        for field in ("tags", "hierarchy", "clusters", "groups"):
            values = getattr(self, field)
            if values is not None:
                lengths[field] = len(values)
        for field, length in lengths.items():
            if length != n:
                raise ValueError(f"{field}: expected {n} entries, one per key, got {length}")
        if self.labels.keys() != self.label_names.keys():
            raise ValueError(f"label_names: expected {sorted(self.labels)}, got {sorted(self.label_names)}")
        unknown = set(np.unique(self.split).tolist()) - set(SPLITS)
        if unknown:
            raise ValueError(f"split: expected {', '.join(SPLITS)}, got {', '.join(sorted(unknown))}")

    def __len__(self) -> int:
        return len(self.keys)

    def indices(self, split: str) -> NDArray[np.int64]:
        """Positions of one split's samples, ascending; ``np.flatnonzero(self.split == split)``.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: for any other name.
        """
        if not isinstance(split, str) or split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return np.flatnonzero(self.split == split).astype(np.int64, copy=False)

    def digest(self, *fields: str) -> str:
        """32 hexadecimal digits of the keys, the split and the named fields; the pictures do not count.

        Args:
            fields: names of attributes, such as "tags".
        """
        made = blake2b(digest_size=16)
        for field in ("keys", "split", *fields):
            made.update(json.dumps([field, getattr(self, field)], default=np.ndarray.tolist).encode())
        return made.hexdigest()


def encode_labels(values: list[str | None], train: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[str]]:
    """Numbers the label values that the training split has, in sorted order; every other value is −1.

    Args:
        values: one per sample; None where unknown.
        train: bool [n], true for samples of the training split.

    Returns:
        int64 [n] and the names that they index.
    """
    seen = {value for value, in_train in zip(values, train, strict=True) if in_train}
    names = sorted(value for value in seen if value is not None)
    number: dict[str | None, int] = {name: index for index, name in enumerate(names)}
    return np.array([number.get(value, -1) for value in values], dtype=np.int64), names
