"""Files that are replaced whole: a reader finds the old or the new, at whatever moment a writer dies.

And folders that one process at a time writes to.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """An empty file beside ``file`` to write to, with its suffix; at the end it takes its place.

    It is the caller's alone: of several that replace ``file`` at once the last one's stands, whole.
    After an error ``file`` is what it was, and nothing is left beside it; a kill leaves what was written, see
    :func:`remove_leftovers`.

    Args:
        file: need not exist; its folder has to.
    """
    beside = _beside(file)
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())  # the name must not reach the disk before the content
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _beside(file: Path) -> Path:
    """A new file that `remove_leftovers` knows, of this process's number."""
    beside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        beside.touch(exist_ok=False)
    except FileExistsError:
        # A leftover's, another thread's, or that of a container in which another process has this number.
        beside = file.with_name(f".{file.stem}.{os.getpid()}-{secrets.token_hex(4)}{file.suffix}")
        beside.touch()
    return beside


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """``folder`` for the caller alone: a second one, of whatever process, is refused until the first is done.

    Whoever dies lets go of it. Where the file system has no locks no one is refused.

    Args:
        folder: made where there is none.

    Raises:
        ValueError: another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is being written to by another process: wait for it, or choose another folder"
            ) from None
        except OSError:  # no locks there
            pass
        yield
    finally:
        os.close(lock)


def write_text(file: Path, text: str) -> None:
    """``file.write_text(text)``, but the file is replaced whole."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def remove_leftovers(file: Path) -> None:
    """Remove what :func:`replacing` left beside ``file`` in processes that were killed.

    What a living process may still be writing stays. What has this process's number is taken for a leftover
    of an earlier one (in a container all have the same): no thread of its own may be replacing ``file``.

    Args:
        file: neither it nor its folder need exist.
    """
    for beside in file.parent.glob(".*"):
        found = re.fullmatch(
            rf"\.{re.escape(file.stem)}\.([0-9]+)(?:-[0-9a-f]{{8}})?{re.escape(file.suffix)}", beside.name
        )
        if found and not _is_another(int(found[1])):
            beside.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether a process of this number lives that is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # no signal: only whether there is one to get it
    except (ProcessLookupError, OverflowError):  # the latter: no process can have that number
        return False
    except PermissionError:  # another user's
        pass
    return True
