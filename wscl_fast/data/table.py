"""A metadata table and the complaints about its rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from wscl_fast.data.extras import train_extra

_SHOWN = 10


class Table:
    """Columns of strings read from a CSV or Parquet file; an empty or blank cell is None.

    Args:
        path: a file whose name ends in .csv, .parquet or .pq.

    Raises:
        ValueError: if the file is missing, of another kind, unreadable, or has no rows.
    """

    def __init__(self, path: Path) -> None:
        with train_extra():
            import polars as pl
        if not path.is_file():
            raise ValueError(f"table: {path} is no file")
        suffix = path.suffix.lower()
        if suffix not in (".csv", ".parquet", ".pq"):
            raise ValueError(f"table: expected a .csv or .parquet file, got {path}")
        try:
            # Every CSV cell is read as text: an id like 007 stays what it is.
            frame = pl.read_csv(path, infer_schema=False) if suffix == ".csv" else pl.read_parquet(path)
            text = frame.with_columns(
                pl.col(name).list.eval(pl.element().cast(pl.String)).list.join(" ")
                if isinstance(kind, pl.List)
                else pl.col(name).cast(pl.String)
                for name, kind in frame.schema.items()
            ).with_columns(pl.all().str.strip_chars().replace("", None))
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"table: {path} cannot be read: {str(error).splitlines()[0]}") from error
        if text.height == 0:
            raise ValueError(f"table: {path} has no rows")
        self.path = path
        self.names: list[str] = text.columns
        self.n_rows: int = text.height
        self._columns: dict[str, list[str | None]] = text.to_dict(as_series=False)

    def column(self, name: str) -> list[str | None]:
        """The cells of a column.

        Raises:
            ValueError: if there is no such column (the nearest name is offered), or it is empty throughout.
        """
        if name not in self._columns:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"column {name!r} is not in {self.path.name}: {hint}It has {', '.join(map(repr, self.names))}"
            )
        cells = self._columns[name]
        if all(cell is None for cell in cells):
            raise ValueError(
                f"column {name!r} of {self.path.name} is empty: rows 1 to {self.n_rows} have no value"
            )
        return cells


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
