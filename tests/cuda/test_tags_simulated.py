"""Sums weighed by common tags in the simulator, against the float64 definition."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from simulator import CSRC, Device, ptxsim
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


@functools.cache
def library() -> ctypes.CDLL:
    sim = ptxsim()
    sources = [Path(__file__).parent / "tags_entry.cu", CSRC / "core" / "tags_cuda.cu"]
    loaded = sim.load(sim.compile_kernels(sources, include_dirs=[CSRC], arch="90"))
    for which, struct in enumerate((TagProblem, TagSums)):
        assert loaded.wscl_tags_size(which) == ctypes.sizeof(struct), struct.__name__
    return loaded


def weighted_sum(rows: Tensor, columns: Tensor, values: Tensor, jaccard: bool) -> tuple[Tensor, Tensor]:
    n, words = rows.shape
    m, d = values.shape
    with Device() as device:
        inputs = (device.put(rows), device.put(columns), device.put(values))
        sums, totals = device.empty(n, d), device.empty(n, dtype=torch.float64)
        problem = TagProblem(*(x.data_ptr() for x in inputs), n, m, words, d, d, jaccard)
        outputs = TagSums(sums=sums.data_ptr(), totals=totals.data_ptr())
        for _ in range(2):  # the first call tells how much memory the second needs
            assert library().wscl_tag_weighted_sum(ctypes.byref(problem), ctypes.byref(outputs), None) == 0
            if not outputs.workspace:
                space = device.empty(max(outputs.workspace_bytes, 1), dtype=torch.uint8, name="workspace")
                outputs.workspace = space.data_ptr()
    return sums, totals


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


@pytest.mark.parametrize("jaccard", [False, True], ids=["shared", "jaccard"])
@pytest.mark.parametrize(
    ("n", "m", "d", "words"),
    [(65, 300, 64, 1), (1, 1, 1, 1), (64, 33, 200, 2), (3, 3000, 8, 1), (130, 64, 63, 3)],
)
def test_matches_float64(n: int, m: int, d: int, words: int, jaccard: bool) -> None:
    torch.manual_seed(0)

    def tags(count: int) -> Tensor:
        few = torch.zeros(count, words, dtype=torch.int64)
        for _ in range(4):  # the sign's bit among them; some sets stay empty
            word = torch.randint(0, words, (count, 1))
            few |= torch.zeros_like(few).scatter(1, word, 1 << torch.randint(54, 64, (count, 1)))
        return few.masked_fill(torch.rand(count, 1) < 0.1, 0)

    rows, columns, values = tags(n), tags(m), torch.randn(m, d)
    sums, totals = weighted_sum(rows, columns, values, jaccard)
    weights = definition(rows, columns, jaccard)
    exact, plain = weights @ values.double(), (weights.float() @ values).double()
    allowed = (plain - exact).abs().max() + 1e-6 * exact.abs().max() + 1e-30
    assert (sums.double() - exact).abs().max() <= allowed
    assert torch.allclose(totals, weights.sum(1), rtol=1e-6)
    again, _ = weighted_sum(rows, columns, values, jaccard)
    assert torch.equal(sums, again)


def test_nothing_to_sum() -> None:
    rows = torch.ones(3, 1, dtype=torch.int64)
    sums, totals = weighted_sum(rows, rows[:0], torch.empty(0, 5), False)
    assert sums.abs().max() == 0
    assert totals.abs().max() == 0
