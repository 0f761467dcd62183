"""A user's folder: what is read, what is refused, what is cached."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wscl_fast.data import ImageDataset, load_folder
from wscl_fast.data.decode import read_image
from wscl_fast.data.tags import Cell, parse_path, parse_tags

pl = pytest.importorskip("polars")

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SIZE = 16
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10), (10, 200, 200), (90, 90, 90)]


def _picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


class Home:
    """A folder of six pictures and its table, to be changed by each test."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "pictures"
        self.table = root / "metadata.csv"
        self.cache = root / "cache"
        self.columns: dict[str, list[str | None]] = {
            "path": [f"{'ab'[i % 2]}/{i}.png" for i in range(6)],
            "split": ["train", "train", "train", "train", "val", "test"],
            "label": ["cat", "dog", "cat", "dog", "cat", "dog"],
            "tags": ["#cat #sofa", "Dog; beach", "cat,sofa", None, "#cat#tree", "dog  dog"],
            "colour": ["red", "green", "blue", None, "cyan", "grey"],
            "taxonomy": ["pet/cat", "pet/dog/beagle", "pet/cat", None, "pet/cat", "pet/dog"],
            "coarse": ["pet", "pet", "pet", None, "pet", "pet"],
            "fine": ["cat", "dog", None, "dog", "cat", "dog"],
            "group": ["g1", "g2", "g1", "007", "g1", "g2"],
        }
        for path, colour in zip(self.columns["path"], COLOURS, strict=True):
            assert path is not None
            _picture(self.folder / path, colour)

    def load(self, **options: Any) -> ImageDataset:
        frame = pl.DataFrame(self.columns)
        if self.table.suffix == ".csv":
            frame.write_csv(self.table)
        else:
            frame.write_parquet(self.table)
        arguments = {"image_size": SIZE, "cache_dir": self.cache} | options
        return load_folder(self.folder, self.table, **arguments)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_everything_is_read(home: Home, suffix: str) -> None:
    home.table = home.table.with_suffix(suffix)
    data = home.load(
        tag_column="tags",
        attribute_columns=["colour", "coarse"],
        hierarchy_columns=["taxonomy"],
        cluster_column="group",
    )
    assert data.name == "pictures"
    assert data.keys == home.columns["path"]
    assert data.images.shape == (6, 3, SIZE, SIZE)
    assert isinstance(data.images, np.memmap)
    assert [tuple(image[:, 8, 8]) for image in data.images] == COLOURS
    assert data.split.tolist() == home.columns["split"]
    assert data.indices("train").tolist() == [0, 1, 2, 3]
    assert data.indices("test").tolist() == [5]
    assert data.label_names == {"label": ["cat", "dog"]}
    assert data.labels["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert data.tags == [("cat", "sofa"), ("dog", "beach"), ("cat", "sofa"), (), ("cat", "tree"), ("dog",)]
    assert data.attributes is not None
    assert data.attributes["colour"].tolist() == ["red", "green", "blue", "", "cyan", "grey"]
    assert data.hierarchy is not None
    assert data.hierarchy[1] == ("pet", "dog", "beagle")
    assert data.hierarchy[3] == ()
    assert data.clusters is not None
    assert data.clusters.tolist() == ["g1", "g2", "g1", "007", "g1", "g2"]
    assert data.attribution == ""
    assert data.n_skipped == 0


def test_hierarchy_by_columns_stops_at_a_gap(home: Home) -> None:
    data = home.load(hierarchy_columns=["coarse", "fine"])
    assert data.hierarchy == [("pet", "cat"), ("pet", "dog"), ("pet",), (), ("pet", "cat"), ("pet", "dog")]


def test_labels_are_optional(home: Home) -> None:
    home.columns["species"] = home.columns.pop("label")
    assert home.load().labels == {}
    home.columns["species"][1] = None
    assert home.load(label_columns=["species"]).labels["species"].tolist() == [0, -1, 0, 1, 0, 1]


def test_split_is_optional(home: Home) -> None:
    del home.columns["split"]
    assert set(home.load(split_column=None).split.tolist()) == {"train"}


def test_parquet_lists_of_tags(home: Home, tmp_path: Path) -> None:
    home.table = tmp_path / "lists.parquet"
    home.columns["tags"] = [["Cat", "sofa"], [], None, ["dog"], ["a"], ["b", "c"]]  # type: ignore[list-item]
    assert home.load(tag_column="tags").tags == [("cat", "sofa"), (), (), ("dog",), ("a",), ("b", "c")]


def test_parquet_lists_stay_lists(home: Home, tmp_path: Path) -> None:
    home.table = tmp_path / "lists.parquet"
    home.columns["tags"] = [["#Cat", "New York"], [" "], [None, "b"], ["d"], ["d"], ["d"]]  # type: ignore[list-item]
    home.columns["taxonomy"] = [["pet", "big cat"], [], None, ["pet"], ["pet", ""], ["pet"]]  # type: ignore[list-item]
    data = home.load(tag_column="tags", hierarchy_columns=["taxonomy"])
    assert data.tags == [("cat", "new york"), (), ("b",), ("d",), ("d",), ("d",)]
    assert data.hierarchy == [("pet", "big cat"), (), (), ("pet",), ("pet",), ("pet",)]


def test_only_the_columns_in_use_have_to_be_text(home: Home, tmp_path: Path) -> None:
    table = tmp_path / "wide.parquet"
    frame = pl.DataFrame(home.columns).with_columns(
        pl.lit(b"\xff").alias("bytes"),
        pl.lit(3).cast(pl.Duration).alias("time"),
        pl.Series("nested", [[[1.0]]] * 6),
        pl.concat_list(pl.col("label"), pl.lit("x")).list.to_array(2).alias("array"),
    )
    frame.write_parquet(table)
    options: dict[str, Any] = {"image_size": SIZE, "cache_dir": home.cache}
    assert load_folder(home.folder, table, tag_column="array", **options).tags[0] == ("cat", "x")  # type: ignore[index]
    for name in ("bytes", "time", "nested"):
        with pytest.raises(
            ValueError, match=rf"column '{name}' of wide.parquet: expected text, numbers or lis"
        ):
            load_folder(home.folder, table, tag_column=name, **options)


@pytest.mark.parametrize(
    ("suffix", "ids"),
    [
        (".csv", ["b", "-1", "10", "9", "-1", "b"]),
        (".parquet", [12, -1, 10, 11, -1, 12]),
        (".parquet", [12.0, float("nan"), 10.0, 11.0, -1.0, 12.0]),
    ],
)
def test_minus_one_is_no_cluster(home: Home, suffix: str, ids: list[Any]) -> None:
    home.table = home.table.with_suffix(suffix)
    home.columns["group"] = ids
    clusters = home.load(cluster_column="group").clusters
    assert clusters is not None
    assert clusters.tolist() == [2, -1, 0, 1, -1, 2]


def test_nan_is_a_missing_value(home: Home, tmp_path: Path) -> None:
    nan, table = float("nan"), tmp_path / "floats.parquet"
    floats = [1.0, 2.0, 1.0, nan, 2.0, nan]
    frame = pl.DataFrame(home.columns).with_columns(label=pl.Series(floats))
    blank = pl.DataFrame({"path": [None], "label": [nan]}, schema_overrides={"path": pl.String})
    pl.concat([frame, blank], how="diagonal").write_parquet(table)
    options: dict[str, Any] = {"attribute_columns": ["label"], "hierarchy_columns": ["coarse", "label"]}
    data = load_folder(home.folder, table, image_size=SIZE, cache_dir=home.cache, **options)
    assert data.label_names == {"label": ["1.0", "2.0"]}
    assert data.labels["label"].tolist() == [0, 1, 0, -1, 1, -1]
    assert data.attributes is not None
    assert data.attributes["label"].tolist() == ["1.0", "2.0", "1.0", "", "2.0", ""]
    assert data.hierarchy is not None
    assert data.hierarchy[5] == ("pet",)


def test_blank_rows_are_no_rows(home: Home) -> None:
    pl.DataFrame(home.columns).write_csv(home.table)
    header, first, *rest = home.table.read_text().splitlines()
    home.table.write_text("\n".join([header, first, "", *rest, "  ", ",,", ""]))
    options: dict[str, Any] = {"image_size": SIZE, "cache_dir": home.cache, "cluster_column": "group"}
    assert load_folder(home.folder, home.table, **options).keys == home.columns["path"]
    assert load_folder(home.folder, home.table, split_column=None, **options).keys == home.columns["path"]
    _missing_file(home)  # the fourth picture is in the fifth row
    with pytest.raises(ValueError, match=r"row 5 \(b/3.png\): there is no file"):
        load_folder(home.folder, home.table, **options)
    home.table.write_text("path,split\n\n,\n")
    with pytest.raises(ValueError, match="has no rows"):
        load_folder(home.folder, home.table, **options)


def test_an_empty_label_column_that_nobody_named_is_left(home: Home) -> None:
    home.columns["label"] = [None] * 6
    assert home.load().labels == {}
    with pytest.raises(ValueError, match=r"column 'label' of metadata.csv is empty"):
        home.load(label_columns=["label"])


@pytest.mark.parametrize(
    ("cell", "tags"),
    [
        ("#dog #beach", ("dog", "beach")),
        ("#Dog#beach", ("dog", "beach")),
        ("dog;beach", ("dog", "beach")),
        ("dog, beach ,dog", ("dog", "beach")),
        ("  café\t日本 ", ("café", "日本")),
        ("rock-n-roll", ("rock-n-roll",)),
        ("# ;, ", ()),
        ("", ()),
        (None, ()),
        (("#Dog", "New York", "dog", "#"), ("dog", "new york")),
    ],
)
def test_parse_tags(cell: Cell, tags: tuple[str, ...]) -> None:
    assert parse_tags(cell) == tags


def test_parse_path() -> None:
    assert parse_path(" animal / dog//beagle/ ") == ("animal", "dog", "beagle")
    assert parse_path(None) == ()
    assert parse_path(("animal", "dog/wolf")) == ("animal", "dog/wolf")


# What is wrong with a row: each error says which.


def _missing_file(home: Home) -> None:
    (home.folder / "b/3.png").unlink()


def _undecodable(home: Home) -> None:
    (home.folder / "b/3.png").write_bytes(b"not a picture")


def _truncated(home: Home) -> None:
    whole = (home.folder / "b/3.png").read_bytes()
    (home.folder / "b/3.png").write_bytes(whole[: len(whole) // 2])


def _duplicate(home: Home) -> None:
    home.columns["path"][3] = "./a/0.png"


def _duplicate_from_the_root(home: Home) -> None:
    home.columns["path"][3] = str((home.folder / "a/0.png").absolute())


def _too_long(home: Home) -> None:
    home.columns["path"][3] = "x" * 300


def _null_path(home: Home) -> None:
    home.columns["path"][3] = None


def _null_split(home: Home) -> None:
    home.columns["split"][3] = " "


def _null_cluster(home: Home) -> None:
    home.columns["group"][3] = None


def _bad_split(home: Home) -> None:
    home.columns["split"][3] = "trian"


def _label_only_in_test(home: Home) -> None:
    home.columns["split"][3] = "test"
    home.columns["label"][3] = "owl"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_file, r"row 4 \(b/3.png\): there is no file .*3\.png"),
        (_undecodable, r"row 4 \(b/3.png\): cannot be decoded \(UnidentifiedImageError"),
        (_truncated, r"row 4 \(b/3.png\): cannot be decoded"),
        (_duplicate, r"row 4 \(./a/0.png\): has the same path as row 1"),
        (_duplicate_from_the_root, r"row 4 \(/.*/a/0.png\): has the same path as row 1"),
        (_too_long, r"row 4 \(x+\): there is no file .*xxx"),
        (_null_path, r"row 4 \(no path\): column 'path' is empty"),
        (_null_split, r"row 4 \(b/3.png\): column 'split' is empty"),
        (_null_cluster, r"row 4 \(b/3.png\): column 'group' is empty"),
        (_bad_split, r"row 4 \(b/3.png\): split is 'trian', expected one of train, val, test"),
        (_label_only_in_test, r"row 4 \(b/3.png\): label 'owl' is only seen in 'test', never in 'train'"),
    ],
)
def test_bad_row_is_named_or_skipped(
    home: Home, damage: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(home)
    with pytest.raises(ValueError, match=r"^1 of 6 rows of metadata.csv cannot be used\n  " + message):
        home.load(cluster_column="group")
    with caplog.at_level(logging.WARNING, logger="wscl_fast"):
        data = home.load(cluster_column="group", on_error="skip")
    assert data.n_skipped == 1
    assert data.keys == ["a/0.png", "b/1.png", "a/2.png", "a/4.png", "b/5.png"]
    assert [tuple(image[:, 8, 8]) for image in data.images] == [c for i, c in enumerate(COLOURS) if i != 3]
    assert len(data.labels["label"]) == len(data.split) == 5
    assert "1 of 6 rows of metadata.csv" in caplog.text


def test_undecodable_is_remembered_with_the_cache(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    _undecodable(home)
    assert home.load(on_error="skip").n_skipped == 1
    monkeypatch.setattr("wscl_fast.data.folder.decode_images", None)  # the cache answers
    assert home.load(on_error="skip").n_skipped == 1
    with pytest.raises(ValueError, match="row 4"):
        home.load()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_a_failure_that_may_pass_is_not_remembered(
    home: Home, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> Any:
        if path.name == "3.png":
            raise error
        return opened(path)

    opened = Image.open
    monkeypatch.setattr(Image, "open", fail)
    assert home.load(on_error="skip").n_skipped == 1
    monkeypatch.setattr(Image, "open", opened)
    assert len(home.load()) == 6


def test_many_bad_rows_are_summed_up(home: Home) -> None:
    for column in home.columns.values():
        column *= 20
    with pytest.raises(ValueError, match=r"114 of 120 rows(?s:.)*row 7 (?s:.)*and 104 more\n"):
        home.load()


def test_several_faults_at_once(home: Home) -> None:
    _missing_file(home)
    home.columns["split"][0] = "later"
    (home.folder / "a/2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^2 of 6 rows(?s:.)*row 1 (?s:.)*row 4 "):
        home.load()
    assert not home.cache.exists()  # what needs no decoding is said before it
    data = home.load(on_error="skip")
    assert data.n_skipped == 4  # without row 1 and 3 no cat is left to train on: row 5 goes too
    assert data.keys == ["b/1.png", "b/5.png"]
    _picture(home.folder / "b/3.png", COLOURS[3])
    home.columns["split"][0] = "val"
    with pytest.raises(ValueError, match=r"^3 of 6 rows(?s:.)*row 1 (?s:.)*row 3 (?s:.)*row 5 "):
        home.load()


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_nothing_left(home: Home, on_error: str) -> None:
    for path in home.columns["path"]:
        assert path is not None
        (home.folder / path).write_bytes(b"broken")
    with pytest.raises(ValueError, match="6 of 6 rows" if on_error == "raise" else "no usable row"):
        home.load(on_error=on_error)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_file_at_all(home: Home, on_error: str) -> None:
    home.columns["path"] = [f"nowhere/{i}.png" for i in range(6)]
    with pytest.raises(ValueError, match="6 of 6 rows" if on_error == "raise" else "no usable row"):
        home.load(on_error=on_error)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_column_errors_are_never_skipped(home: Home, on_error: str) -> None:
    home.columns["empty"] = [None, "", "  ", None, None, ""]
    with pytest.raises(ValueError, match=r"column 'empty' of metadata.csv is empty: rows 1 to 6"):
        home.load(tag_column="empty", on_error=on_error)
    with pytest.raises(ValueError, match=r"column 'colours' is not in metadata.csv: did you mean 'colour'\?"):
        home.load(attribute_columns=["colours"], on_error=on_error)
    with pytest.raises(ValueError, match=r"column 'zzz' is not in metadata.csv: It has 'path', 'split'"):
        home.load(cluster_column="zzz", on_error=on_error)


def test_a_name_of_two_columns_is_refused(home: Home) -> None:
    text = pl.DataFrame(home.columns).write_csv()
    home.table.write_text(text.replace("colour", "label", 1).replace("fine", "coarse", 1))
    options: dict[str, Any] = {"image_size": SIZE, "cache_dir": home.cache}
    with pytest.raises(ValueError, match=r"column 'label' stands more than once in metadata.csv"):
        load_folder(home.folder, home.table, **options)
    assert len(load_folder(home.folder, home.table, label_columns=["group"], **options)) == 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_error": "ignore"}, ValueError, "on_error: expected 'raise' or 'skip', got 'ignore'"),
        ({"image_size": 2}, ValueError, "image_size"),
        ({"attribute_columns": "colour"}, TypeError, "attribute_columns: expected a sequence"),
        ({"hierarchy_columns": "taxonomy"}, TypeError, "hierarchy_columns"),
        ({"label_columns": "label"}, TypeError, "label_columns"),
        ({"path_column": None}, TypeError, "path_column: expected a column's name, got NoneType"),
        ({"path_column": 3}, TypeError, "path_column: expected a column's name, got int"),
        ({"split_column": 3}, TypeError, "split_column: expected a column's name, got int"),
        ({"attribute_columns": None}, TypeError, "attribute_columns: expected a sequence .* got NoneType"),
        ({"hierarchy_columns": (3,)}, TypeError, "hierarchy_columns: expected a column's name, got int"),
        ({"image_size": 8.5}, TypeError, "image_size: expected an int, got float"),
        ({"on_error": np.zeros(2)}, ValueError, "on_error: expected 'raise' or 'skip'"),
    ],
)
def test_wrong_arguments(home: Home, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        home.load(**options)


def test_wrong_places(home: Home, tmp_path: Path) -> None:
    home.load()
    options: dict[str, Any] = {"image_size": SIZE, "cache_dir": home.cache}
    with pytest.raises(ValueError, match=r"folder: .* is no directory"):
        load_folder(tmp_path / "nowhere", home.table, **options)
    with pytest.raises(ValueError, match=r"table: .* is no file"):
        load_folder(home.folder, tmp_path / "no.csv", **options)
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a .csv or .parquet file"):
        load_folder(home.folder, tmp_path / "table.xlsx", **options)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read"):
        load_folder(home.folder, tmp_path / "broken.parquet", **options)
    (tmp_path / "header.csv").write_text("path,split\n")
    with pytest.raises(ValueError, match="has no rows"):
        load_folder(home.folder, tmp_path / "header.csv", **options)


# The cache follows the pictures, not the words about them.


def test_cache_follows_the_pictures(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.load()
    assert len(list(home.cache.glob("*.npy"))) == 1
    home.columns["tags"][0] = "#other"
    home.load(tag_column="tags")
    assert len(list(home.cache.glob("*.npy"))) == 1
    _picture(home.folder / "a/0.png", (1, 2, 3))
    os.utime(home.folder / "a/0.png", ns=(1, 1))
    assert tuple(home.load().images[0, :, 8, 8]) == (1, 2, 3)
    home.load(image_size=8)
    assert len(list(home.cache.glob("*.npy"))) == 3


# Decoding.


def test_shorter_side_and_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 40, 16))  # the central square
    wide.save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 16)
    assert (image == np.array([0, 0, 255], dtype=np.uint8)[:, None, None]).all()


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 8) == 255).all()
    Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", 8) == 77).all()
    Image.fromarray(np.full((20, 20), 0x4D21, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 8) == 0x4D).all()
    Image.fromarray(np.full((20, 20), 0x4D21, dtype=np.uint16)).save(tmp_path / "deep.pgm")
    assert (read_image(tmp_path / "deep.pgm", 8) == 0x4D).all()
    Image.fromarray(np.full((20, 20), 77, dtype=np.int32)).save(tmp_path / "wide.tif")
    assert (read_image(tmp_path / "wide.tif", 8) == 77).all()


@pytest.mark.parametrize("pixel", [np.int32(1 << 20), np.int32(-1), np.float32(0.5)])
def test_pixels_without_a_known_white_are_refused(tmp_path: Path, pixel: Any) -> None:
    Image.fromarray(np.full((20, 20), pixel)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="expected pixels of 8 or 16 bits, got"):
        read_image(tmp_path / "wide.tif", 8)


def test_exif_turns_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.jpg", exif=exif)
    image = read_image(tmp_path / "turned.jpg", 8)
    assert image[:, 0].mean() > 200
    assert image[:, -1].mean() < 50


# Real tables.


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared metadata tables are not beside the repository")
@pytest.mark.parametrize("name", ["ut-zappos50k", "wider"])
def test_real_tables(tmp_path: Path, name: str) -> None:
    frames = [
        pl.read_csv(SHARED / name / f"meta_data_{split}.csv")
        .group_by("class", maintain_order=True)
        .head(3)
        .with_columns(split=pl.lit(split))
        for split in ("train", "val")
    ]
    table = pl.concat(frames, how="diagonal")
    table.write_csv(tmp_path / "meta.csv")
    # The published tables carry a stray row without a picture, which must be counted and passed over.
    pictures = table.filter(pl.col("path").str.ends_with(".jpg"))
    assert 0 < pictures.height < table.height
    for row, path in enumerate(pictures["path"]):
        _picture(tmp_path / "images" / path, (row % 256, 100, 50), size=(12, 12))
    data = load_folder(
        tmp_path / "images",
        tmp_path / "meta.csv",
        image_size=8,
        cache_dir=tmp_path / "cache",
        on_error="skip",
        label_columns=["class"],
        hierarchy_columns=["path"],
    )
    assert data.n_skipped == table.height - pictures.height
    assert data.keys == pictures["path"].to_list()
    red = data.images[:, 0, 4, 4].astype(int)
    assert np.abs(red - np.arange(pictures.height) % 256).max() < 16  # they are JPEGs
    names = data.label_names["class"]
    assert [names[label] for label in data.labels["class"]] == [str(c) for c in pictures["class"]]
    assert data.hierarchy is not None
    assert "/".join(data.hierarchy[0]) == data.keys[0]
