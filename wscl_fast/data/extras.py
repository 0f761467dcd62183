"""One place that says what to install when a package of the ``train`` extra is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def train_extra() -> Iterator[None]:
    """Turns the failed import of an optional package into one line that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "wscl_fast":
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed: pip install "wscl-fast[train]"', name=error.name
        ) from None


def package_dir(name: str) -> Path:
    """Where an optional package keeps its files, found without importing it.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = find_spec(name)
    with train_extra():
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(name, name=name)
    return Path(next(iter(spec.submodule_search_locations)))
