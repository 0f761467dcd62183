"""Samples that do not fit into memory: matrices in files, read in blocks, the next one ahead of its use."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wscl_fast.clustering.base import check_count

_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,  # safetensors
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,  # numpy
}
_SUFFIXES = (".npy", ".safetensors", ".parquet")


class FeatureFiles:
    """The rows of one or several files as one matrix of samples, for :meth:`KMeans.fit` and its like.

    Equals `np.concatenate([np.load(file) for file in files])`, of which a few blocks are in memory at a time
    while a thread reads the next one.

    Args:
        paths: `.npy` (two-dimensional, C order), `.safetensors` or `.parquet` files, or a folder of them,
            taken in the order of their names; all of one width and float dtype.
        memory: bytes that blocks of samples may take in all. Beyond it, a fit keeps about 50 bytes a sample,
            and the centroids.
        column: the tensor of a safetensors file (where it has several), or the list column of a Parquet file;
            by default the only one, or all columns of floats side by side (integers count as ids or labels).
        device: where blocks go once they are read, and where the samples are clustered ("cuda").

    Attributes:
        shape: rows and columns of all files together.
        dtype: of the samples.
        device: as given.

    Raises:
        FileNotFoundError: no such file, or nothing of these kinds in the folder.
        TypeError: `paths` that are none; integers, or another dtype that is no float.
        ValueError: another kind of file, not a matrix, files that do not fit together, or (once they are
            read) lists of several lengths.
        ImportError: Parquet without polars.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        memory: int = 256 << 20,
        column: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_count(memory, "memory")
        self.column = column
        files = _listed(paths)
        self.parts = [_open(file, column) for file in files]
        first = next((part for part in self.parts if part.width), self.parts[0])
        if not first.width:
            raise ValueError(f"{first.file}: expected a matrix [samples, features], got lists of no numbers")
        for part in self.parts:
            if (part.width or first.width, part.dtype) != (first.width, first.dtype):
                raise ValueError(
                    f"{part.file}: expected {first.width} columns of {first.dtype} as in {first.file}, "
                    f"got {part.width} of {part.dtype}"
                )
        self.starts = np.cumsum([0] + [part.rows for part in self.parts])
        self.shape = (int(self.starts[-1]), first.width)
        self.dtype, self.device = first.dtype, torch.device(device)
        row = first.width * first.dtype.itemsize
        # One block is used, the next is being read; Parquet and the products need room beside them.
        self.block = memory // (4 * row)
        if self.block < 1:
            raise ValueError(f"memory: expected at least {4 * row} bytes, four rows, got {memory}")
        self.block = min(self.block, max(1, self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, block by block; the next is read while one is used."""
        starts = range(0, len(self), self.block)
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for start in starts:
                stop = min(start + self.block, len(self))
                coming = reader.submit(self.read, start, stop)
                if ahead is not None:
                    rows, waiting = ahead
                    ahead = (slice(start, stop), coming)
                    yield rows, waiting.result().to(self.device)
                else:
                    ahead = (slice(start, stop), coming)
            if ahead is not None:
                yield ahead[0], ahead[1].result().to(self.device)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, over the borders of files, on the CPU."""
        found = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        done = 0
        for number in range(int(np.searchsorted(self.starts, start, side="right")) - 1, len(self.parts)):
            if done == len(found):
                break
            part, first = self.parts[number], start + done - int(self.starts[number])
            count = min(len(found) - done, part.rows - first)
            if count:
                part.read(first, first + count, found[done : done + count])
            done += count
        return found

    def take(self, index: Tensor) -> Tensor:
        """Some rows by number; those that lie near each other are read together, a block at most."""
        rows, order = index.cpu().sort(stable=True)
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        gap = max(part.gap for part in self.parts) / (self.shape[1] * self.dtype.itemsize)
        apart = (rows.diff() > gap) | ((rows // self.block).diff() != 0)
        ends = apart.nonzero()[:, 0] + 1
        for some, places in zip(rows.tensor_split(ends), order.tensor_split(ends), strict=True):
            if len(some):
                first = int(some[0])
                found[places] = self.read(first, int(some[-1]) + 1)[some - first]
        return found.to(self.device)

    def fingerprint(self) -> list[Any]:
        """What tells whether the files are still the same."""
        parts = [[str(p.file), p.rows, p.width, os.stat(p.file).st_mtime_ns] for p in self.parts]
        return [self.column, *parts]


class _Part(ABC):
    """One file's matrix, of width 0 where no row tells it."""

    gap: float = 1 << 16  # bytes between two rows that are sooner read than passed over

    def __init__(self, file: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self.file, self.rows, self.width, self.dtype = file, rows, width, dtype

    @abstractmethod
    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Put rows `start` to `stop` into `out`."""


class _Plain(_Part):
    """Rows that lie one after the other in the file."""

    def __init__(self, file: Path, shape: Sequence[int], dtype: str, offset: int) -> None:
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"{file}: expected a matrix [samples, features], got shape {list(shape)}")
        if dtype not in _DTYPES:
            raise TypeError(f"{file}: expected a float dtype in little-endian order, got {dtype}")
        super().__init__(file, shape[0], shape[1], _DTYPES[dtype])
        self.offset = offset
        end = offset + math.prod(shape) * self.dtype.itemsize
        if file.stat().st_size < end:
            raise ValueError(
                f"{file}: expected at least {end} bytes, got {file.stat().st_size}: it is cut short"
            )

    def read(self, start: int, stop: int, out: Tensor) -> None:
        row = self.width * self.dtype.itemsize
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * row)
            target = memoryview(out.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
            while len(target):  # a read may stop early
                got = stream.readinto(target)
                if not got:
                    raise OSError(f"{self.file}: ended while rows {start} to {stop} were read")
                target = target[got:]


class _Parquet(_Part):
    """Columns of a Parquet file, of which polars unpacks the row groups that are asked for."""

    gap = math.inf  # one row costs as much as all of its group

    def __init__(self, file: Path, column: str | None) -> None:
        try:
            import polars
        except ImportError as error:
            raise ImportError(f"{file}: Parquet files are read by polars, which is not installed") from error
        self._frame = polars.scan_parquet(file)
        try:
            schema = self._frame.collect_schema()
        except polars.exceptions.PolarsError as error:
            raise ValueError(f"{file}: cannot be read as a Parquet file: {error}") from error
        if column is not None and column not in schema:
            raise ValueError(f"column: expected one of {list(schema)} of {file}, got {column!r}")
        nested = [name for name, kind in schema.items() if kind.base_type() in (polars.List, polars.Array)]
        if column is None and len(nested) == 1:
            column = nested[0]
        self._columns = [column] if column else [name for name, kind in schema.items() if kind.is_float()]
        if not self._columns:
            raise TypeError(
                f"{file}: expected columns of floats or a list column of them, got {dict(schema)}"
            )
        rows = int(self._frame.select(polars.len()).collect().item())
        super().__init__(file, rows, 0, torch.float32)
        sample = self._rows(0, 1)
        if rows and not sample.shape[1]:
            raise ValueError(f"{file}: expected a matrix [samples, features], got an empty list in row 0")
        super().__init__(file, rows, sample.shape[1], sample.dtype)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._rows(start, stop))

    def _rows(self, start: int, stop: int) -> Tensor:
        import polars

        frame = self._frame.select(self._columns).slice(start, stop - start).collect()
        series = frame.to_series(0)
        if series.dtype.base_type() == polars.List:
            lengths = series.list.len().fill_null(0).to_numpy()
            width = self.width or int(lengths[:1].sum())  # the first list tells
            other = np.flatnonzero(lengths != width)
            if len(other):
                row = int(other[0])
                raise ValueError(
                    f"{self.file}: expected lists of {width} numbers, got {lengths[row]} in row {start + row}"
                )
            values = series.explode().to_numpy()[: width * len(series)].reshape(len(series), width)
        else:
            values = series.to_numpy() if series.dtype.base_type() == polars.Array else frame.to_numpy()
        if values.ndim != 2 or values.dtype.str not in _DTYPES:
            raise TypeError(f"{self.file}: expected one row of floats a sample, got {values.dtype}")
        return torch.from_numpy(np.array(values))


def _listed(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, str | Path):
        folder = Path(paths)
        found = [folder]
        if folder.is_dir():
            found = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES)
            if not found:
                raise FileNotFoundError(f"{folder}: no {', '.join(_SUFFIXES)} file in it")
        return found
    if not isinstance(paths, Iterable):
        raise TypeError(f"paths: expected a path or several, got {type(paths).__name__}")
    files = []
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"paths[{len(files)}]: expected a path, got {type(path).__name__}")
        files.append(Path(path))
    if not files:
        raise ValueError("paths: expected at least one file, got none")
    return files


def _open(file: Path, column: str | None) -> _Part:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".npy":
        shape, fortran, dtype, offset = _npy_header(file)
        if fortran and len(shape) > 1:
            raise ValueError(f"{file}: expected rows one after the other (C order), got Fortran order")
        return _Plain(file, shape, dtype, offset)
    if file.suffix == ".safetensors":
        header, offset = _safetensors_header(file)
        names = [name for name in header if name != "__metadata__"]
        if column is None and len(names) != 1:
            raise ValueError(f"column: expected one of the tensors {names} of {file}, got None")
        name = names[0] if column is None else column
        if name not in names:
            raise ValueError(f"column: expected one of the tensors {names} of {file}, got {name!r}")
        tensor_shape, kind, start = _entry(file, name, header[name])
        return _Plain(file, tensor_shape, kind, offset + start)
    if file.suffix == ".parquet":
        return _Parquet(file, column)
    raise ValueError(f"{file}: expected one of {', '.join(_SUFFIXES)}")


def _npy_header(file: Path) -> tuple[tuple[int, ...], bool, str, int]:
    """Shape, whether it is in Fortran order, dtype, and where the numbers begin."""
    with file.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read: Any = (  # untyped until NumPy 2.3
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(stream)
        except ValueError as error:
            raise ValueError(f"{file}: cannot be read as a .npy file: {error}") from error
        return shape, fortran, dtype.str, stream.tell()


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """What the file says about each of its tensors, and where the numbers begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # Of another kind of file these bytes are any number, too large for memory as a rule.
        text = stream.read(length) if length <= file.stat().st_size - 8 else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as a .safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: cannot be read as a .safetensors file: its header is no dictionary")
    return header, 8 + length


def _entry(file: Path, name: str, entry: Any) -> tuple[list[int], str, int]:
    """A tensor's shape, dtype, and where it begins among the numbers."""
    match entry:
        case {"shape": [*shape], "dtype": str(dtype), "data_offsets": [int(start), int()]}:
            if start >= 0 and all(isinstance(size, int) and size >= 0 for size in shape):
                return shape, dtype, start
    raise ValueError(
        f"{file}: cannot be read as a .safetensors file: expected shape, dtype and data_offsets of tensor "
        f"{name!r}, got {entry}"
    )
