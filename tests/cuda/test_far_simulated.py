"""Logits so large that their rounding is more than exponents bear: what is finite stays so, and is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from simulated_infonce import run
from simulated_pairs import PairPasses
from test_infonce_simulated import EPSILON
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


def check(got: dict[str, Tensor], wanted: dict[str, Tensor], most: float = 0.02) -> None:
    """No number is further off than ``most`` of the largest of its kind."""
    for name, want in wanted.items():
        assert got[name].isfinite().all(), name
        error = (got[name].double() - want.detach()).abs().max()
        assert error <= most * want.abs().max(), (name, float(error), float(want.abs().max()))


class Problem(NamedTuple):
    """Of clustered InfoNCE, with float64's results; ``keys=None`` is the in-batch case."""

    queries: Tensor
    keys: Tensor | None
    query_ids: Tensor
    key_ids: Tensor | None
    upstream: Tensor
    wanted: dict[str, Tensor]


def problem_of(
    queries: Tensor,
    keys: Tensor,
    size: float,
    inner: bool,
    in_batch: bool,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """``size``: the scale of the logits; ``dtype``: another than float64 for its results."""
    query_ids, key_ids, upstream = (
        torch.randint(12, (70,)),
        torch.randint(12, (150,)),
        torch.full((70,), 1 / 70),
    )
    x, y = (rows.to(dtype, copy=True).requires_grad_() for rows in (queries, keys))
    scale = torch.tensor(size, dtype=dtype, requires_grad=True)
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


def infonce(case: Case, inner: bool, in_batch: bool) -> Problem:
    return problem_of(*case.vectors(), case.scale, inner, in_batch)


@pytest.mark.parametrize("in_batch", [False, True], ids=["keys", "batch"])
@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_infonce(case: Case, inner: bool, in_batch: bool) -> None:
    *given, upstream, wanted = infonce(case, inner, in_batch)
    got = run(*given, scale=case.scale, inner=inner, grad_loss=upstream, fast=case.fast)
    check(vars(got), wanted)


def alike(dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor]:
    """Unit vectors, two of each: a query's largest logits are those of keys that are the query itself."""
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(150, d), dim=1)
    keys[1::2] = keys[::2]
    return keys[:70].to(dtype), keys.to(dtype)


# Whole rows and three slices of rows that stream.
WIDTHS = [
    (dtype, d)
    for dtype in (*HALVES, torch.float32)
    for d in ((128, 300) if dtype.itemsize == 4 else (256, 600))
]


@pytest.mark.parametrize("positives", ["out", "out in batch", "in", "in in batch"])
@pytest.mark.parametrize("scale", [1e5, 5e6])  # that of 2^23 is 5.8e6
@pytest.mark.parametrize(("dtype", "d"), WIDTHS, ids=str)
def test_logits_that_are_not_far_yet(dtype: torch.dtype, d: int, scale: float, positives: str) -> None:
    """All passes and all slices agree on them to the last bit, so gradients are as exact as ever."""
    inner, in_batch = positives.startswith("in"), positives.endswith("in batch")
    *given, upstream, wanted = problem_of(*alike(dtype, d), scale, inner, in_batch)
    got = vars(run(*given, scale=scale, inner=inner, grad_loss=upstream))
    if dtype == torch.float32 and positives == "in":
        # Logits of different rows decide, which float32 rounds: less than half of what PyTorch makes of that.
        plain = problem_of(*alike(dtype, d), scale, inner, in_batch, dtype).wanted
        for name in ("grad_queries", "grad_keys"):
            want = wanted.pop(name)
            assert (got[name] - want).abs().max() <= (plain[name] - want).abs().max() / 2, name
    check(got, wanted, 2 * EPSILON[dtype])


def test_logits_beside_far_ones() -> None:
    """Each row has a shift of its own, and what others have does not matter."""
    queries, keys = alike(torch.float32, 32)
    sizes = torch.logspace(-0.3, 0.3, 70)[torch.randperm(70), None]
    scale = 4e6
    *given, upstream, wanted = problem_of(sizes * queries, keys, scale, False, False)
    got = run(*given, scale=scale, grad_loss=upstream / scale)
    keys_alone = {"grad_keys": wanted["grad_keys"] / scale}
    check(vars(got), keys_alone, 2 * EPSILON[torch.float32])


@pytest.mark.parametrize("scale", [1e5, 1e6])
@pytest.mark.parametrize(("dtype", "d"), WIDTHS, ids=str)
def test_slices_share_their_sums(dtype: torch.dtype, d: int, scale: float) -> None:
    """Weights add up to 1 in each: of columns of ones a mean is 1, whatever logits are rounded to."""
    queries, keys = alike(dtype, d)
    ones = torch.arange(31, d, 32)
    queries[:, ones], keys[:, ones] = 0, 1
    with PairPasses(queries, keys, scale=scale) as passes:
        means = passes.logsumexp(torch.full((70,), 1 / scale))["grad_queries"][:, ones]
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=2 * EPSILON[dtype])


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
