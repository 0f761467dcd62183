"""Files that are replaced whole: a reader finds the old or the new, at whatever moment a writer dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to, with its suffix; at the end what is there takes its place.

    After an error ``file`` is what it was, and nothing is left beside it.

    Args:
        file: need not exist; its folder has to.
    """
    beside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())  # the name must not reach the disk before the content
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """``file.write_text(text)``, but the file is replaced whole."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")
