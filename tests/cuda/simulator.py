"""The CUDA core, compiled by nvcc to PTX and run by ptxsim on the CPU; its params structs as ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def folder_of_ptxsim() -> Path:
    return Path(os.environ.get("PTXSIM_PATH", ROOT.parent / "shared"))


def why_not() -> str:
    """Why nothing can be simulated here; empty where it can."""
    if not (shutil.which("nvcc") or os.environ.get("PTXSIM_NVCC")):
        return "nvcc is not on PATH: CUDA kernels cannot be compiled"
    folder = folder_of_ptxsim()
    if not (folder / "ptxsim" / "__init__.py").is_file():
        return f"no ptxsim in {folder}: set PTXSIM_PATH to the folder that contains it"
    return ""


@functools.cache
def ptxsim() -> Any:
    """The simulator's module; skips the test, with the reason, where it or nvcc is missing."""
    if reason := why_not():
        pytest.skip(reason)
    sys.path.insert(0, str(folder_of_ptxsim()))
    import ptxsim

    ptxsim.set_option("GLOBAL_RACE", True)  # the one check that is off by default: between CTAs
    return ptxsim


CHECKS = ("RACE", "SHARED_INIT", "INITCHECK", "GLOBAL_RACE")


@contextlib.contextmanager
def counting_only(device: str = "H100") -> Iterator[None]:
    """No checks, which makes large problems several times faster; the grid is chosen for a device."""
    sim = ptxsim()
    try:
        sim.set_option("DEVICE", device)
        for check in CHECKS:
            sim.set_option(check, False)
        yield
    finally:
        sim.set_option("DEVICE", "H100")
        for check in CHECKS:
            sim.set_option(check, True)


def infonce_sources(csrc: Path = CSRC) -> list[Path]:
    """The CUDA core but for k-means."""
    return sorted(p for p in (csrc / "core").glob("*.cu") if not p.stem.startswith("kmeans"))


def with_headers(sources: Iterable[Path], csrc: Path = CSRC) -> list[Path]:
    """Sources and every header of ours that they include, however indirectly."""
    found: set[Path] = set()
    left = list(sources)
    while left:
        path = left.pop().resolve()
        if path not in found:
            found.add(path)
            for name in re.findall(r'#include "(.+?)"', path.read_text()):
                left += [p for p in (path.parent / name, csrc / name) if p.exists()]
    return sorted(found)


def staged(sources: Iterable[Path], csrc: Path = CSRC) -> tuple[list[Path], Path]:
    """Sources and the headers that they include, alone in a folder: no other change compiles them anew.

    Where they lie now, and the folder to include from.
    """
    csrc, sources = csrc.resolve(), [path.resolve() for path in sources]

    def place(path: Path) -> Path:
        return path.relative_to(csrc) if path.is_relative_to(csrc) else Path(path.name)

    files = with_headers(sources, csrc)
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(str(place(path)).encode() + path.read_bytes())
    folder = ROOT / "build" / "staged" / hashed.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        for path in files:
            (part / place(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part / place(path))
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return [folder / place(path) for path in sources], folder


@functools.cache
def built_by_cmake() -> Path | None:
    """All kernels for architecture 90 as make cuda compiled them; None where these are not its sources."""
    built = ROOT / "build" / "simulator" / "libwscl_simulated.so"
    sources = with_headers([*(CSRC / "core").glob("*.cu"), *Path(__file__).parent.glob("*entry.cu")])
    newest = max(path.stat().st_mtime for path in sources)
    return built if built.exists() and built.stat().st_mtime > newest else None


@functools.cache
def library(arch: str = "90") -> ctypes.CDLL:
    """All kernels for one architecture, linked with the simulator's runtime."""
    sim = ptxsim()
    built = built_by_cmake() if arch == "90" else None
    if built is None:
        sources, folder = staged([Path(__file__).parent / "entry.cu", *infonce_sources()])
        built = sim.compile_kernels(sources, include_dirs=[folder], arch=arch, flags=["-t2"])
    loaded = sim.load(built)
    for which, struct in enumerate(STRUCTS):
        assert loaded.wscl_size(which) == ctypes.sizeof(struct), struct.__name__
    return loaded


BFLOAT16, FLOAT16, FLOAT32, FLOAT32_FAST = range(4)
SOFTMAX, COLUMNS, SYMMETRIC = range(3)
PRECISION = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class SimilarityParams(ctypes.Structure):
    """``wscl::cuda::SimilarityParams``."""

    _fields_ = (
        ("precision", ctypes.c_int),
        ("epilogue", ctypes.c_int),
        ("x", Rows),
        ("y", Rows),
        ("x_origin", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("y_valid", ctypes.c_void_p),
        ("row_excluded", ctypes.c_void_p),
        ("column_excluded", ctypes.c_void_p),
        ("excluded_range", ctypes.c_void_p),
        ("excluded_weight", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("outside", ctypes.c_bool),
        ("gate", ctypes.c_void_p),
        ("gate_value", ctypes.c_int32),
        ("row_shift", ctypes.c_void_p),
        ("row_weight", ctypes.c_void_p),
        ("column_shift", ctypes.c_void_p),
        ("column_weight", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p),
        ("x_valid", ctypes.c_void_p),
        ("triangular", ctypes.c_bool),
        ("first_block", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("column_sum", ctypes.c_void_p),
        ("column_stride", ctypes.c_int64),
        ("row_tags", ctypes.c_void_p),
        ("column_tags", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("jaccard", ctypes.c_bool),
        ("total", ctypes.c_void_p),
        ("splits", ctypes.c_int),
        ("whole_rows", ctypes.c_int64),
        ("shift", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
    )


POINTER, SIZE, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool


class InfoNCEProblem(ctypes.Structure):
    """``wscl::cuda::InfoNCEProblem``."""

    _fields_ = (
        ("precision", ctypes.c_int),
        ("queries", POINTER),
        ("query_stride", SIZE),
        ("n", SIZE),
        ("self", FLAG),
        ("keys", POINTER),
        ("key_stride", SIZE),
        ("m", SIZE),
        ("d", SIZE),
        ("query_clusters", POINTER),
        ("key_clusters", POINTER),
        ("own", POINTER),
        ("exclude_self", FLAG),
        ("inner", FLAG),
        ("ignore_index", SIZE),
        ("scale", POINTER),
        ("constant_scale", ctypes.c_float),
        ("sorted_queries", POINTER),
        ("query_order", POINTER),
        ("sorted_keys", POINTER),
        ("key_order", POINTER),
    )


class IdList(ctypes.Structure):
    """``wscl::cuda::IdList``."""

    _fields_ = (
        ("ids", POINTER),
        ("count", SIZE),
        ("sorted", POINTER),
        ("order", POINTER),
        ("spare", POINTER),
    )


class InfoNCEForward(ctypes.Structure):
    """``wscl::cuda::InfoNCEForward``."""

    _fields_ = (
        ("loss", POINTER),
        ("count", POINTER),
        ("stats", POINTER),
        ("direction", POINTER),
        ("need_direction", FLAG),
        ("clusters", POINTER),
        ("workspace", POINTER),
        ("workspace_bytes", SIZE),
    )


class InfoNCEBackward(ctypes.Structure):
    """``wscl::cuda::InfoNCEBackward``."""

    _fields_ = (
        ("grad_loss", POINTER),
        ("share", POINTER),
        ("count", POINTER),
        ("stats", POINTER),
        ("direction", POINTER),
        ("grad_queries", POINTER),
        ("grad_keys", POINTER),
        ("grad_scale", POINTER),
        ("need_queries", FLAG),
        ("need_keys", FLAG),
        ("need_scale", FLAG),
        ("clusters", POINTER),
        ("workspace", POINTER),
        ("workspace_bytes", SIZE),
    )


class InfoNCEReduced(ctypes.Structure):
    """``wscl::cuda::InfoNCEReduced``."""

    _fields_ = (
        ("mean", FLAG),
        ("loss", POINTER),
        ("count", POINTER),
        ("direction", POINTER),
        ("need_direction", FLAG),
        ("kept", POINTER),
        ("workspace", POINTER),
        ("workspace_bytes", SIZE),
    )


STRUCTS = (SimilarityParams, InfoNCEProblem, InfoNCEForward, InfoNCEBackward, InfoNCEReduced)


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 256 bytes, as device memory has them: sectors are counted from there."""
    spare = 256 // tensor.element_size()
    memory = torch.empty(tensor.numel() + spare, dtype=tensor.dtype)
    offset = -memory.data_ptr() % 256 // tensor.element_size()
    return memory[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


class Device:
    """Tensors that kernels may touch, for as long as the ``with`` block lasts; raises on a kernel's fault."""

    def __enter__(self) -> Device:
        self._sim = ptxsim()
        self._sim.reset()
        self._held: list[Tensor] = []
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for tensor in self._held:
            self._sim.unregister(tensor)
        if kind is None:
            self._sim.check()

    def put(self, tensor: Tensor, name: str = "") -> Tensor:
        """An input, which kernels may not write."""
        tensor = aligned(tensor)
        if tensor.numel():
            self._sim.register(tensor, name or None, read_only=True)
            self._held.append(tensor)
        return tensor

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "") -> Tensor:
        """An output, which kernels may not read before they wrote it."""
        tensor = aligned(torch.full(shape, 77, dtype=dtype))
        if tensor.numel():
            self._sim.register(tensor, name or None, uninitialised=True)
            self._held.append(tensor)
        return tensor

    def launches(self) -> list[dict[str, Any]]:
        """One report for each kernel since the block began."""
        return self._sim.launches()


def rows(tensor: Tensor, index: Tensor | None = None) -> Rows:
    """``wscl::cuda::Rows`` of a matrix."""
    count = len(tensor) if index is None else len(index)
    return Rows(tensor.data_ptr(), tensor.stride(0), index.data_ptr() if index is not None else None, count)


def pack_valid(valid: Tensor) -> Tensor:
    """Bits of 64-bit words, from a boolean vector."""
    words = -(-len(valid) // 64)
    bits = torch.zeros(words * 64, dtype=torch.int64)
    bits[: len(valid)] = valid
    return (bits.view(words, 64) << torch.arange(64)).sum(1)
