"""Logits so large that their rounding is more than exponents bear: what is finite stays so, and is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from simulated_infonce import run
from simulated_pairs import PairPasses
from test_pairs_simulated import masked_logsumexp
from torch import Tensor

from wscl_fast import reference
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.simulated

HALVES = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """``rows``: normal numbers; of sizes from near logits to far ones; or with negative logits only."""

    dtype: torch.dtype
    d: int
    rows: str = "normal"
    fast: bool = False

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}{'_fast' if self.fast else ''}-{self.d}-{self.rows}"

    @property
    def magnitude(self) -> float:
        return 3e3 if self.dtype == torch.float16 else 1e5

    @property
    def scale(self) -> float:
        return 30.0 if self.dtype == torch.float16 else 10.0

    def vectors(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        queries, keys = (self.magnitude * torch.randn(rows, self.d) for rows in (70, 150))
        if self.rows == "sizes":
            queries = queries * torch.logspace(-6, 0, 70)[torch.randperm(70), None]
        elif self.rows == "negative":
            queries, keys = queries.abs(), -keys.abs()
        return queries.to(self.dtype), keys.to(self.dtype)


def cases() -> Iterator[Case]:
    """One tile of d, and rows that stream."""
    for dtype, d in itertools.product((*HALVES, torch.float32), (32, 300)):
        yield Case(dtype, d)
    yield Case(torch.float32, 32, fast=True)
    yield Case(torch.bfloat16, 128)  # other tiles
    for dtype, rows in itertools.product((torch.bfloat16, torch.float32), ("sizes", "negative")):
        yield Case(dtype, 32, rows)


def check(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, want in wanted.items():
        assert got[name].isfinite().all(), name
        error = (got[name].double() - want.detach()).abs().max()
        assert error <= 0.02 * want.abs().max(), (name, float(error), float(want.abs().max()))


class Problem(NamedTuple):
    """Of clustered InfoNCE, with float64's results; ``keys=None`` is the in-batch case."""

    queries: Tensor
    keys: Tensor | None
    query_ids: Tensor
    key_ids: Tensor | None
    upstream: Tensor
    wanted: dict[str, Tensor]


def infonce(case: Case, inner: bool, in_batch: bool) -> Problem:
    queries, keys = case.vectors()
    query_ids, key_ids, upstream = (
        torch.randint(12, (70,)),
        torch.randint(12, (150,)),
        torch.full((70,), 1 / 70),
    )
    x, y = queries.double().requires_grad_(), keys.double().requires_grad_()
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    if in_batch:
        pairs = Pairs(x, x, query_ids, query_ids, torch.arange(70), scale)
    else:
        pairs = Pairs(x, y, query_ids, key_ids, None, scale)
    loss, _ = reference.clustered_infonce(pairs, pairs, inner=inner)
    (loss * upstream).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    wanted = {"loss": loss, "grad_queries": x.grad, "grad_scale": scale.grad[None]}
    if in_batch:
        return Problem(queries, None, query_ids, None, upstream, wanted)
    assert y.grad is not None
    return Problem(queries, keys, query_ids, key_ids, upstream, {**wanted, "grad_keys": y.grad})


@pytest.mark.parametrize("in_batch", [False, True], ids=["keys", "batch"])
@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_infonce(case: Case, inner: bool, in_batch: bool) -> None:
    *given, upstream, wanted = infonce(case, inner, in_batch)
    got = run(*given, scale=case.scale, inner=inner, grad_loss=upstream, fast=case.fast)
    check(vars(got), wanted)


@pytest.mark.parametrize("case", [case for case in cases() if not case.fast], ids=str)
def test_pairs(case: Case) -> None:
    """Each side's log-sum-exps, both sides', and sums of softplus, which need no shift."""
    queries, keys = case.vectors()
    of_rows, of_columns, offset = torch.rand(70) / 100, torch.rand(150) / 100, torch.randn(70)

    def definition() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = queries.double().requires_grad_(), keys.double().requires_grad_()
        logits = case.scale * (x @ y.T)
        return x, y, logits, torch.ones_like(logits, dtype=torch.bool)

    with PairPasses(queries, keys, scale=case.scale) as passes:
        x, y, logits, met = definition()
        rows, columns = (masked_logsumexp(logits, met, dim) for dim in (1, 0))
        (rows * of_rows).sum().backward(retain_graph=True)
        check(passes.logsumexp(of_rows), {"lse": rows, "grad_queries": x.grad, "grad_keys": y.grad})
        (columns * of_columns).sum().backward()
        wanted = {"rows": rows, "columns": columns, "grad_queries": x.grad, "grad_keys": y.grad}
        check(passes.two_way(of_rows, of_columns), wanted)
        x, y, logits, met = definition()
        total = torch.nn.functional.softplus(logits + offset[:, None]).sum(1)
        (total * of_rows).sum().backward()
        wanted = {"total": total, "grad_queries": x.grad, "grad_keys": y.grad}
        check(passes.softplus(offset, of_rows), wanted)


def test_squares_that_vanish_bound_nothing() -> None:
    """Rows of 1e-25 have a norm of 0 in float32, and logits of hundreds at such a scale."""
    torch.manual_seed(0)
    queries, keys = 1e-25 * torch.randn(40, 16), 1e15 * torch.randn(50, 16)
    scale = 1e12
    x, y = queries.double(), keys.double()
    logits = scale * (x @ y.T)
    assert logits.abs().max() > 200
    with PairPasses(queries, keys, scale=scale) as passes:
        got = passes.two_way(torch.zeros(40), torch.zeros(50))
    check(got, {"rows": logits.logsumexp(1), "columns": logits.logsumexp(0)})
