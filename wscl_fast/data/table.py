"""A metadata table and the complaints about its rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from wscl_fast.data.extras import train_extra
from wscl_fast.data.tags import Cell

_SHOWN = 10


class Table:
    """Columns of a CSV or Parquet file, read as text; a cell that is empty, blank or NaN is None.

    Args:
        path: a file whose name ends in .csv, .parquet or .pq.

    Attributes:
        names: of the columns.
        n_rows: rows of the file.
        filled: positions of the rows that have a value in some column.

    Raises:
        ValueError: if the file is missing, of another kind, unreadable, or has no rows.
    """

    def __init__(self, path: Path) -> None:
        with train_extra():
            import polars as pl
            from polars import selectors
        if not path.is_file():
            raise ValueError(f"table: {path} is no file")
        suffix = path.suffix.lower()
        if suffix not in (".csv", ".parquet", ".pq"):
            raise ValueError(f"table: expected a .csv or .parquet file, got {path}")
        try:
            # Every CSV cell is read as text: an id like 007 stays what it is.
            frame = pl.read_csv(path, infer_schema=False) if suffix == ".csv" else pl.read_parquet(path)
            self._frame = frame.with_columns(pl.col(pl.String).str.strip_chars().replace("", None))
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"table: {path} cannot be read: {str(error).splitlines()[0]}") from error
        self.path = path
        self.names: list[str] = frame.columns
        self.n_rows: int = frame.height
        there = pl.any_horizontal(pl.all().is_not_null())
        known = self._frame.with_columns(selectors.float().fill_nan(None))
        self.filled: list[int] = known.select(there).to_series().arg_true().to_list() if frame.height else []
        if not self.filled:
            raise ValueError(f"table: {path} has no rows")

    def column(self, name: str, *, keep_nan: bool = False) -> list[str | None]:
        """The cells of a column as text; the entries of a list are joined by spaces.

        Args:
            name: of the column.
            keep_nan: NaN is the text "NaN", not None.

        Raises:
            ValueError: as `cells`.
        """
        cells = self.cells(name, keep_nan=keep_nan)
        return [" ".join(cell) if isinstance(cell, tuple) else cell for cell in cells]

    def cells(self, name: str, *, keep_nan: bool = False) -> list[Cell]:
        """The cells of a column; in a column of lists each is a tuple of what is not blank in it.

        Args:
            name: of the column.
            keep_nan: NaN is the text "NaN", not None.

        Raises:
            ValueError: if there is no such column (the nearest name is offered) or more than one, or it
                cannot be read as text, or is empty throughout.
        """
        import polars as pl

        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"column {name!r} is not in {self.path.name}: {hint}It has {', '.join(map(repr, self.names))}"
            )
        self._check_once(name)
        column, kind = self._frame[name], self._frame.schema[name]
        if kind.is_float() and not keep_nan:
            column = column.fill_nan(None)
        lists = isinstance(kind, pl.List | pl.Array)
        try:
            values = column.cast(pl.List(pl.String) if lists else pl.String).to_list()
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f"column {name!r} of {self.path.name}: expected text, numbers or lists of them, got {kind}"
            ) from error
        cells = [_stripped(value) for value in values]
        if all(cell is None for cell in cells):
            raise ValueError(
                f"column {name!r} of {self.path.name} is empty: rows 1 to {self.n_rows} have no value"
            )
        return cells

    def serves(self, name: str, *, in_every_row: bool = False) -> bool:
        """Whether there is such a column with a value in some row, or in every row that is filled at all.

        Only ids of clusters are needed in every row, and NaN is one of them.

        Raises:
            ValueError: if there is more than one.
        """
        self._check_once(name)
        try:
            cells = self.cells(name, keep_nan=in_every_row)
        except ValueError:
            return False
        return not in_every_row or all(cells[row] is not None for row in self.filled)

    def _check_once(self, name: str) -> None:
        if f"{name}_duplicated_0" in self.names:  # what polars calls a second one in a CSV file
            raise ValueError(f"column {name!r} stands more than once in {self.path.name}")


def _stripped(value: str | list[str | None] | None) -> Cell:
    if isinstance(value, list):
        return tuple(entry.strip() for entry in value if entry and entry.strip()) or None
    return (value or "").strip() or None


class RowErrors:
    """What is wrong with which row; the first complaint about a row counts.

    Rows are numbered from 1, the first below the header.

    Args:
        table: name of the table, for messages.
        paths: the path cell of every row, for messages.
    """

    def __init__(self, table: str, paths: Sequence[str | None]) -> None:
        self.table = table
        self.paths = paths
        self.reasons: dict[int, str] = {}

    def add(self, row: int, reason: str) -> None:
        """Notes a reason against the row at position ``row`` (from 0)."""
        self.reasons.setdefault(row, reason)

    def good(self, rows: Iterable[int]) -> list[int]:
        """Those of the rows that nothing was said against."""
        return [row for row in rows if row not in self.reasons]

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        lines = [
            f"row {row + 1} ({self.paths[row] or 'no path'}): {reason}"
            for row, reason in sorted(self.reasons.items())[:_SHOWN]
        ]
        if len(self.reasons) > _SHOWN:
            lines.append(f"and {len(self.reasons) - _SHOWN} more")
        return (
            f"{len(self.reasons)} of {len(self.paths)} rows of {self.table} cannot be used\n  "
            + "\n  ".join(lines)
        )
