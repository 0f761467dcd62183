"""Every loss over rows of any width, any alignment, any stride, and of more numbers than 32 bits count."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loss_cases import FUSED, IMPLS, LOSSES, problem, values
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.functional import clustered_infonce
from wscl_fast.pairs import Pairs

needs_kernels = pytest.mark.skipif(not FUSED, reason="the extension is not built")


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("d", [1, 2, 17, 1000, 4095, 4096])
@pytest.mark.parametrize("name", LOSSES)
def test_any_width(name: str, d: int, impl: str) -> None:
    case = problem(9, 21, d, seed=d)
    got, want = (values(name, case, torch.float64, temperature=0.5, impl=i) for i in (impl, "reference"))
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


def shifted(x: Tensor, places: int) -> Tensor:
    """The same numbers, each row so many numbers behind its last aligned place."""
    room = torch.empty(len(x) * (x.shape[1] + 1) + places, dtype=x.dtype)
    view = room[places:].view(len(x), x.shape[1] + 1)[:, :-1]
    return view.copy_(x)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_any_alignment(name: str, dtype: torch.dtype) -> None:
    q, k, qc, kc = problem(30, 130, 33, seed=0)
    results = []
    for move in (lambda x: x, lambda x: shifted(x, 1), lambda x: shifted(x, 5)):
        leaves = [move(x.to(dtype)).detach().requires_grad_() for x in (q, k)]
        loss = LOSSES[name](*leaves, qc, kc, impl="fused")
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for moved in results[1:]:
        for here, there in zip(moved, results[0], strict=True):
            torch.testing.assert_close(here, there)


@needs_kernels
@pytest.mark.parametrize("name", LOSSES)
def test_rows_further_apart_than_32_bits_count(name: str, tmp_path: Path) -> None:
    """Three rows of one sparse file, more than 2³⁰ numbers from each other, on either side."""
    apart, d = (1 << 30) + 3, 40
    with (tmp_path / "far").open("wb") as file:
        file.truncate(4 * (2 * apart + d))
    room = torch.from_file(str(tmp_path / "far"), shared=True, size=2 * apart + d)
    far = room.as_strided((3, d), (apart, 1))
    q, k, qc, kc = problem(3, 50, d, seed=1)
    qc = qc.clamp(min=0)
    far.copy_(q)
    q, k = q.float(), k.float()
    for near, away in (((q, k), (far, k)), ((k, q), (k, far))):
        ids = (qc, kc) if near[0].shape == q.shape else (kc, qc)
        results = []
        for vectors in (near, away):
            leaves = [x.detach().requires_grad_() for x in vectors]
            loss = LOSSES[name](*leaves, *ids, impl="fused")
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for here, there in zip(*results, strict=True):
            torch.testing.assert_close(here, there)


@needs_kernels
def test_matrices_of_more_numbers_than_32_bits_count() -> None:
    """2²¹ keys of 1024 and some, all of them one row: the loss is the logarithm of their number."""
    m, d = (1 << 21) + 64, 1024
    row = torch.nn.functional.normalize(torch.randn(d), dim=0)
    keys = row.expand(m, d)
    assert keys.numel() > 1 << 31
    loss = clustered_infonce(
        row[None].repeat(2, 1),
        keys,
        query_clusters=torch.arange(2),
        key_clusters=torch.arange(m) % 3,
        impl="fused",
    )
    torch.testing.assert_close(loss.item(), math.log(m), rtol=1e-6, atol=0)


@needs_kernels
def test_more_pairs_than_32_bits_count() -> None:
    """Numbers instead of vectors, four values on either side: each row has the loss of its value."""
    n, m = 1 << 16, (1 << 15) + 4
    x = torch.tensor([[-1.0], [-0.2], [0.4], [1.0]])
    ids = torch.arange(4)
    small = clustered_infonce(x, x, query_clusters=ids, key_clusters=ids, temperature=0.5, reduction="none")
    rows = clustered_infonce(
        x.repeat(n // 4, 1),
        x.repeat(m // 4, 1),
        query_clusters=ids.repeat(n // 4),
        key_clusters=ids.repeat(m // 4),
        temperature=0.5,
        reduction="none",
        impl="fused",
    )
    want = small + math.log(m // 4)
    torch.testing.assert_close(rows.view(-1, 4), want.expand(n // 4, 4), rtol=1e-5, atol=1e-5)
    columns = _ops.two_way_logsumexp(
        Pairs(x.repeat(n // 4, 1), x.repeat(m // 4, 1), None, None, None, torch.tensor(2.0))
    )[1]
    by_value = (2 * x @ x.T).logsumexp(1) + math.log(n // 4)
    torch.testing.assert_close(columns.view(-1, 4), by_value.expand(m // 4, 4), rtol=1e-5, atol=1e-5)
