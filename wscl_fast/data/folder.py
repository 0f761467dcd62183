"""A user's own pictures: a folder and a CSV or Parquet table that says what is known about each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wscl_fast.data.cache import PASSING, Notes, cached_images
from wscl_fast.data.checks import check_int
from wscl_fast.data.dataset import SPLITS, ImageDataset, encode_labels
from wscl_fast.data.decode import decode_images
from wscl_fast.data.table import RowErrors, Table
from wscl_fast.data.tags import Cell, parse_path, parse_tags

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_CACHE_FORMAT = 2  # raise it when decoding changes
_NO_CLUSTER = ("-1", "-1.0", "nan")  # as integers and floats say it


def load_folder(
    folder: Path | str,
    table: Path | str,
    *,
    image_size: int,
    cache_dir: Path | str,
    on_error: OnError = "raise",
    path_column: str = "path",
    split_column: str | None = "split",
    label_columns: Sequence[str] | None = None,
    tag_column: str | None = None,
    attribute_columns: Sequence[str] = (),
    hierarchy_columns: Sequence[str] = (),
    cluster_column: str | None = None,
) -> ImageDataset:
    """Pictures in a folder with the table that describes them, decoded once and cached.

    The cache is keyed by the files' paths, sizes and times of change and by ``image_size``: a changed tag
    costs nothing, a changed picture is decoded again. Rows that are blank throughout are no rows. NaN in a
    column of floats is an empty cell, but for clusters.

    Args:
        folder: paths in the table start here.
        table: .csv (with a header) or .parquet, a row per picture.
        image_size: height and width in pixels; the shorter side is resized to it, the longer one cropped.
        cache_dir: where decoded pictures are kept; made if missing.
        on_error: "raise" names the rows that cannot be used, before any picture is decoded where the table
            and the folder tell; "skip" counts, logs and leaves them out.
        path_column: the picture's path in the folder; required in each row, none twice.
        split_column: "train", "val" or "test", required in each row; None puts every row into "train".
        label_columns: downstream labels; an empty cell is unknown. None takes "label" if there is one
            with a value.
        tag_column: tags separated by spaces, commas, semicolons or "#"; or lists of tags.
        attribute_columns: discrete attributes; an empty cell is the value "".
        hierarchy_columns: one column of "/"-separated paths or of lists, or one column per level from the
            root.
        cluster_column: ids that come with the data; required in each row. −1 and NaN say "no cluster": where
            there are any, the others are numbered in sorted order.

    Raises:
        TypeError: naming an argument of another type than is written here.
        ValueError: naming the row (1 is the first below the header) and path of a missing or undecodable
            file, a path that comes twice, an empty required cell, an unknown split, a label that the training
            split lacks; naming the column that is missing (with the nearest name there is) or empty
            throughout; if no row of the training split is left, or an argument is out of range.
    """
    if not isinstance(on_error, str) or on_error not in get_args(OnError):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    image_size = check_int(image_size, "image_size")
    if not 8 <= image_size <= 1024:
        raise ValueError(f"image_size: expected 8 to 1024 pixels, got {image_size}")
    folder, rows = Path(folder), Table(Path(table))
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is no directory")
    for name, columns in (
        ("label_columns", () if label_columns is None else label_columns),
        ("attribute_columns", attribute_columns),
        ("hierarchy_columns", hierarchy_columns),
    ):
        if isinstance(columns, str):
            raise TypeError(f"{name}: expected a sequence of column names, got the string {columns!r}")
        if not isinstance(columns, Sequence):
            raise TypeError(f"{name}: expected a sequence of column names, got {type(columns).__name__}")
        for entry in columns:
            _check_column(name, entry)
    _check_column("path_column", path_column)
    for name, given in (
        ("split_column", split_column),
        ("tag_column", tag_column),
        ("cluster_column", cluster_column),
    ):
        if given is not None:
            _check_column(name, given)
    if label_columns is None:
        label_columns = ("label",) if rows.serves("label") else ()

    paths = rows.column(path_column)
    splits = ["train"] * rows.n_rows if split_column is None else rows.column(split_column)
    labels = {name: rows.column(name) for name in label_columns}
    tags = None if tag_column is None else rows.cells(tag_column)
    attributes = {name: rows.column(name) for name in attribute_columns}
    levels = [rows.cells(name) for name in hierarchy_columns]
    clusters = None if cluster_column is None else rows.column(cluster_column, keep_nan=True)

    errors = RowErrors(rows.path.name, paths)
    for column, cells in ((path_column, paths), (split_column, splits), (cluster_column, clusters)):
        if cells is not None:
            for row in rows.filled:
                if cells[row] is None:
                    errors.add(row, f"column {column!r} is empty")
    _check_splits(splits, errors)
    _check_files(folder, paths, errors)
    _check_labels(labels, splits, errors.good(rows.filled), errors)
    if errors and on_error == "raise":
        raise _refusal(errors)

    candidates = errors.good(rows.filled)
    files = [str(paths[row]) for row in candidates]

    def build(target: Path) -> Notes:
        failures = decode_images([folder / file for file in files], image_size, target)
        return {
            "failures": {files[index]: failure.reason for index, failure in failures.items()},
            PASSING: any(failure.passing for failure in failures.values()),
        }

    cache = Path(cache_dir) / f"folder-{image_size}px-{_fingerprint(folder, files, image_size)}.npy"
    images, notes = cached_images(cache, (3, image_size, image_size), build)
    for row in candidates:
        if paths[row] in notes["failures"]:
            errors.add(row, f"cannot be decoded ({notes['failures'][paths[row]]})")
    decoded = errors.good(candidates)
    _check_labels(labels, splits, decoded, errors)
    kept = errors.good(decoded)

    if errors and on_error == "raise":
        raise _refusal(errors)
    if errors:
        logger.warning("skipped: %s", errors)
    if not any(splits[row] == "train" for row in kept):
        raise ValueError(f"{rows.path.name}: no usable row has the split 'train'")
    if len(kept) < len(decoded):  # a label was refused after decoding: rare enough to copy
        images = images[np.searchsorted(decoded, kept)]

    split = np.array([str(splits[row]) for row in kept])
    coded = {
        name: encode_labels([cells[row] for row in kept], split == "train") for name, cells in labels.items()
    }
    return ImageDataset(
        name=folder.resolve().name,
        images=images,
        keys=[str(paths[row]) for row in kept],
        split=split,
        labels={name: values for name, (values, _) in coded.items()},
        label_names={name: names for name, (_, names) in coded.items()},
        tags=None if tags is None else [parse_tags(tags[row]) for row in kept],
        attributes={name: np.array([cells[row] or "" for row in kept]) for name, cells in attributes.items()}
        or None,
        hierarchy=[_path(levels, row) for row in kept] if levels else None,
        clusters=None if clusters is None else _clusters([str(clusters[row]) for row in kept]),
        n_skipped=len(errors),
    )


def _refusal(errors: RowErrors) -> ValueError:
    return ValueError(f"{errors}\non_error='skip' goes on without them")


def _clusters(ids: list[str]) -> NDArray[np.str_] | NDArray[np.int64]:
    """The ids as they are; numbered, where some say that there is no cluster, with −1 for those."""
    known = [None if id_.lower() in _NO_CLUSTER else id_ for id_ in ids]
    return encode_labels(known, np.ones(len(ids), dtype=bool))[0] if None in known else np.array(ids)


def _check_column(name: str, column: object) -> None:
    if not isinstance(column, str):
        raise TypeError(f"{name}: expected a column's name, got {type(column).__name__}")


def _check_splits(splits: Sequence[str | None], errors: RowErrors) -> None:
    for row, split in enumerate(splits):
        if split is not None and split not in SPLITS:
            errors.add(row, f"split is {split!r}, expected one of {', '.join(SPLITS)}")


def _check_files(folder: Path, paths: Sequence[str | None], errors: RowErrors) -> None:
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        if path is None:
            continue
        seen = first.setdefault(os.path.abspath(folder / path), row)  # relative in one row, whole in another
        if seen != row:
            errors.add(row, f"has the same path as row {seen + 1}")
        elif not os.path.isfile(folder / path):  # Path's own raises for a name that is too long to look for
            errors.add(row, f"there is no file {folder / path}")


def _check_labels(
    labels: dict[str, list[str | None]], splits: Sequence[str | None], rows: Sequence[int], errors: RowErrors
) -> None:
    for name, cells in labels.items():
        known = {cells[row] for row in rows if splits[row] == "train"}
        for row in rows:
            if cells[row] is not None and cells[row] not in known:
                errors.add(row, f"{name} {cells[row]!r} is only seen in {splits[row]!r}, never in 'train'")


def _path(levels: Sequence[list[Cell]], row: int) -> tuple[str, ...]:
    if len(levels) == 1:
        return parse_path(levels[0][row])
    path: list[str] = []
    for level in levels:
        cell = level[row]
        if cell is None:  # deeper levels without this one would hang in the air
            break
        path.extend((cell,) if isinstance(cell, str) else cell)
    return tuple(path)


def _fingerprint(folder: Path, files: Sequence[str], image_size: int) -> str:
    digest = blake2b(f"{_CACHE_FORMAT} {image_size} {folder.resolve()}".encode(), digest_size=8)
    for file in files:
        stat = (folder / file).stat()
        digest.update(f"\0{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
