"""Sums weighed by common tags in the simulator, against the float64 definition."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from simulator import Device, library
from test_infonce_simulated import ARCHITECTURES, SIZES, WIDTHS, Deviation
from torch import Tensor

pytestmark = pytest.mark.simulated


class TagProblem(ctypes.Structure):
    """``wscl::cuda::TagProblem``."""

    _fields_ = (
        ("row_tags", ctypes.c_void_p),
        ("column_tags", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("jaccard", ctypes.c_bool),
    )


class TagSums(ctypes.Structure):
    """``wscl::cuda::TagSums``."""

    _fields_ = (
        ("sums", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class Case(NamedTuple):
    n: int
    m: int
    d: int
    words: int
    jaccard: bool
    dtype: torch.dtype = torch.float32
    arch: str = "90"

    def __str__(self) -> str:
        weights = "jaccard" if self.jaccard else "shared"
        return f"sm{self.arch}-{weights}-{self.n}x{self.m}x{self.d}-words{self.words}"


def covering_cases() -> Iterator[Case]:
    for jaccard in (False, True):
        for shape in ((65, 300, 64, 1), (1, 1, 1, 1), (64, 33, 200, 2), (3, 3000, 8, 1), (130, 64, 63, 3)):
            yield Case(*shape, jaccard)


def every_case() -> Iterator[Case]:
    """Every architecture, N, d and kind of weight; every M with every N and d; one to three words of tags."""
    for arch, (at, n), (column, d), jaccard in itertools.product(
        ARCHITECTURES, enumerate(SIZES), enumerate(WIDTHS), (False, True)
    ):
        yield Case(n, SIZES[(at * 3 + column) % len(SIZES)], d, 1 + (at + column) % 3, jaccard, arch=arch)


class Outcome(NamedTuple):
    sums: Tensor
    totals: Tensor
    launches: list[dict[str, Any]]


def weighted_sum(rows: Tensor, columns: Tensor, values: Tensor, jaccard: bool, arch: str = "90") -> Outcome:
    n, words = rows.shape
    m, d = values.shape
    kernels = library(arch)
    for which, struct in enumerate((TagProblem, TagSums)):
        assert kernels.wscl_tags_size(which) == ctypes.sizeof(struct), struct.__name__
    with Device() as device:
        inputs = (device.put(rows), device.put(columns), device.put(values))
        sums, totals = device.empty(n, d), device.empty(n, dtype=torch.float64)
        problem = TagProblem(*(x.data_ptr() for x in inputs), n, m, words, d, d, jaccard)
        outputs = TagSums(sums=sums.data_ptr(), totals=totals.data_ptr())
        for _ in range(2):  # the first call tells how much memory the second needs
            assert kernels.wscl_tag_weighted_sum(ctypes.byref(problem), ctypes.byref(outputs), None) == 0
            if not outputs.workspace:
                space = device.empty(max(outputs.workspace_bytes, 1), dtype=torch.uint8, name="workspace")
                outputs.workspace = space.data_ptr()
        launches = device.launches()
    return Outcome(sums, totals, launches)


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Tags of rows and of columns, values."""
    torch.manual_seed(0)

    def tags(count: int) -> Tensor:
        few = torch.zeros(count, case.words, dtype=torch.int64)
        for _ in range(4):  # the sign's bit among them; some sets stay empty
            word = torch.randint(0, case.words, (count, 1))
            few |= torch.zeros_like(few).scatter(1, word, 1 << torch.randint(54, 64, (count, 1)))
        return few.masked_fill(torch.rand(count, 1) < 0.1, 0)

    return tags(case.n), tags(case.m), torch.randn(case.m, case.d)


def run(case: Case) -> Outcome:
    return weighted_sum(*arguments(case), case.jaccard, case.arch)


def bits(tags: Tensor) -> Tensor:
    """``[rows, words * 64]`` of 0 and 1."""
    return (tags[:, :, None] >> torch.arange(64) & 1).flatten(1).double()


def definition(rows: Tensor, columns: Tensor, jaccard: bool) -> Tensor:
    a, b = bits(rows), bits(columns)
    both = a @ b.T
    if not jaccard:
        return (both > 0).double()
    either = a.sum(1)[:, None] + b.sum(1) - both
    return torch.where(either > 0, both / either.clamp(min=1), 0.0)


def deviations(case: Case, got: Outcome) -> dict[str, Deviation]:
    """How far sums and totals are from float64."""
    rows, columns, values = arguments(case)
    weights = definition(rows, columns, case.jaccard)
    plain = weights.float()
    found = {}
    for name, exact, single in (
        ("sums", weights @ values.double(), plain @ values),
        ("totals", weights.sum(1), plain.sum(1)),
    ):
        error = float((getattr(got, name).double() - exact).abs().max())
        allowed = float((single.double() - exact).abs().max())
        found[name] = Deviation(error, allowed, allowed + 1e-6 * float(exact.abs().max()) + 1e-30)
    return found


@pytest.mark.parametrize("case", list(covering_cases()), ids=str)
def test_matches_float64(case: Case) -> None:
    got = run(case)
    for name, found in deviations(case, got).items():
        assert found.error <= found.most, (name, found)
    assert torch.equal(got.sums, run(case).sums)


def test_nothing_to_sum() -> None:
    rows = torch.ones(3, 1, dtype=torch.int64)
    sums, totals, _ = weighted_sum(rows, rows[:0], torch.empty(0, 5), False)
    assert sums.abs().max() == 0
    assert totals.abs().max() == 0
