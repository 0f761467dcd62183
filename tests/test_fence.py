"""k-means reads nothing beyond its rows: these end where memory does, so that it would be noticed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wscl_fast.functional import kmeans_assign, kmeans_update


def fenced(values: Tensor) -> Tensor:
    """A copy whose end is the end of its pages; those behind may not be touched."""
    size = values.numel() * values.element_size()
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inside + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + inside), mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    copy = torch.frombuffer(pages, dtype=values.dtype, count=values.numel(), offset=inside - size)
    return copy.reshape(values.shape).copy_(values)


@pytest.fixture(autouse=True)
def _instruction_set_as_before(extension) -> Iterator[None]:  # type: ignore[no-untyped-def]
    before = extension.instruction_set()
    yield
    extension.use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [1, 16, 33, 64])
def test_rows_may_end_where_memory_does(extension, d: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for name in extension.supported_instruction_sets():
        extension.use_instruction_set(name)
        for n, k in [(1, 1), (47, 5), (129, 17), (700, 100)]:
            x, centroids = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
            for metric in ("euclidean", "cosine"):
                got = kmeans_assign(fenced(x), fenced(centroids), metric=metric, impl="fused")
                want = kmeans_assign(x, centroids, metric=metric, impl="fused")
                assert torch.equal(got.assignment, want.assignment)
                assert torch.equal(got.distance, want.distance)
            update = kmeans_update(fenced(x), fenced(centroids), impl="fused")
            assert torch.equal(update.sums, kmeans_update(x, centroids, impl="fused").sums)


def test_centroids_too_where_no_score_is_a_number(extension) -> None:  # type: ignore[no-untyped-def]
    """∞ − ∞ with each of the centroids: then a column beyond the last has the best score."""
    x = torch.tensor([[3e38, -3e38, 1.0, 1.0]]).repeat(20, 1)
    centroids = torch.tensor([[2.0], [-2.0], [4.0], [-4.0]]).repeat(1, 4)
    for name in extension.supported_instruction_sets():
        extension.use_instruction_set(name)
        got = kmeans_assign(x, fenced(centroids), impl="fused")
        want = kmeans_assign(x, centroids, impl="reference")
        assert torch.equal(got.assignment, want.assignment)
