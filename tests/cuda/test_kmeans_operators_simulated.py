"""The CUDA binding of k-means on simulated memory: the operators as torch calls them."""

from __future__ import annotations

import pytest
import torch
from described import Described
from simulated_kmeans import library
from simulator import ptxsim
from torch import Tensor

from wscl_fast import reference

pytestmark = pytest.mark.simulated


@pytest.fixture
def ops(extension: object) -> object:
    """``torch.ops`` of the simulated binding; a fault raises, and results that fakes describe otherwise."""
    binding = library()
    ptxsim().reset()
    yield Described(torch.ops.wscl_fast_simulated)
    binding.wscl_forget_tensors()
    ptxsim().check()


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    centroids = torch.randn(40, 24)
    return (centroids[torch.randint(40, (150,))] + 0.5 * torch.randn(150, 24)).to(dtype), centroids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_update(ops, dtype: torch.dtype) -> None:
    x, centroids = problem(dtype)
    weights = torch.rand(150, dtype=torch.float64)
    for w in (None, weights):
        *got, bad_row = ops.kmeans_update(x, centroids, w, False, 0)
        want = reference.kmeans_update(x, centroids, weights=w, cosine=False)
        assert bad_row.shape == ()
        assert int(bad_row) == -1
        assert torch.equal(got[0], want[0])
        for one, other, dtype_ in zip(got[1:], want[1:], (torch.float32, *[torch.float64] * 3), strict=True):
            assert one.shape == other.shape
            assert one.dtype == (other.dtype if dtype_ == torch.float64 else dtype_)
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-12)


def test_assign_with_any_strides(ops) -> None:
    x, centroids = problem()
    want = reference.kmeans_assign(x, centroids, cosine=True, top=3)
    wide = torch.zeros(150, 60)
    wide[:, 1:25] = x
    for view in (x, wide[:, 1:25], x.T.contiguous().T):
        assignment, distance, _ = ops.kmeans_assign(view, centroids.T.contiguous().T, True, 3, 0)
        assert torch.equal(assignment, want[0])
        torch.testing.assert_close(distance, want[1].float())


def test_a_row_that_is_not_finite_is_told(ops) -> None:
    x, centroids = problem()
    x[77, 3] = torch.nan
    assert int(ops.kmeans_assign(x, centroids, False, 1, 0)[2]) == 77


def test_bad_arguments(ops) -> None:
    x, centroids = problem()
    for bad, message in (
        (lambda: ops.kmeans_assign(x.double(), centroids, False, 1, 0), "x: expected float32, bfloat16"),
        (lambda: ops.kmeans_assign(x, centroids.double(), False, 1, 0), "centroids: expected float32"),
        (lambda: ops.kmeans_assign(x[0], centroids, False, 1, 0), "x: expected a matrix"),
        (lambda: ops.kmeans_assign(x, centroids[:, 1:], False, 1, 0), "centroids: expected a matrix"),
        (lambda: ops.kmeans_assign(x, centroids, False, 9, 0), "top: expected 1 to 8"),
        (lambda: ops.kmeans_assign(x, centroids[:2], False, 3, 0), "top: expected 1 to 8"),
        (lambda: ops.kmeans_assign(x, centroids, False, 1, 7), "candidates: expected 0"),
        (lambda: ops.kmeans_update(x, centroids, x[:, 0], False, 0), "weights: wrong dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
