"""Decoded pictures on disk: one uint8 ``.npy`` that is memory-mapped, and a small JSON that vouches for it.

The array is written beside its place and moved there, then the JSON (shape, checksum, notes of the builder).
A reader trusts the array only if the JSON is there and the checksum agrees: a half-written, truncated or
altered cache is rebuilt, whatever moment the writer died at.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wscl_fast.files import replacing, write_text

logger = logging.getLogger(__name__)

Notes = dict[str, Any]
PASSING = "passing"  # a note: true where another try may go better
_CHUNK = 1 << 24


def cached_images(
    path: Path, shape: tuple[int, int, int], build: Callable[[Path], Notes]
) -> tuple[NDArray[np.uint8], Notes]:
    """The cached array at ``path``, memory-mapped read-only, built first where it is missing or broken.

    Args:
        path: the ``.npy`` file; its notes lie beside it with the suffix ``.json``.
        shape: [3, H, W] of one picture, which a cache has to match.
        build: called with the file to write, an ``.npy`` of uint8 [n, 3, H, W]; returns JSON-able notes to
            keep with it. What was built with a true `PASSING` among them is built again by the next call.

    Returns:
        uint8 [n, 3, H, W] and the notes.
    """
    cached = _read(path, shape)
    if cached is not None and not cached[1].get(PASSING):
        return cached
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        notes = build(beside)
        written = np.load(beside, mmap_mode="r", allow_pickle=False)
        record = {"shape": [*written.shape], "crc32": _crc32(beside), "notes": notes}
        del written
    write_text(path.with_suffix(".json"), json.dumps(record))
    built = _read(path, shape)
    if built is None:
        raise OSError(f"{path}: the cache was written but cannot be read back")
    return built


def _read(path: Path, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], Notes] | None:
    record_path = path.with_suffix(".json")
    if not (path.exists() and record_path.exists()):
        return None
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        images: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
        sound = (
            images.dtype == np.uint8
            and images.shape == (record["shape"][0], *shape)
            and _crc32(path) == record["crc32"]
        )
        notes: Notes = record["notes"]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        logger.warning("cache %s is broken (%s); building it again", path, error)
        return None
    if not sound:
        logger.warning("cache %s does not match its record; building it again", path)
        return None
    return images, notes


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
