"""Passes over pairs in the simulator against the float64 definition, as tight as plain PyTorch is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from simulated_pairs import PairPasses
from simulator import ptxsim
from test_infonce_simulated import ARCHITECTURES, SIZES, WIDTHS, Deviation
from torch import Tensor

from wscl_fast.pairs import Meets, Pairs

pytestmark = pytest.mark.simulated

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


class Case(NamedTuple):
    n: int
    m: int
    d: int
    dtype: torch.dtype
    meets: Meets = "all"
    ids: bool = True
    own: bool = True
    scale: float = 10.0
    arch: str = "90"

    def __str__(self) -> str:
        extra = "-".join(name for name in ("ids", "own") if getattr(self, name))
        kind = f"sm{self.arch}-{str(self.dtype)[6:]}-{self.meets}"
        return f"{kind}-{self.n}x{self.m}x{self.d}-{extra}-scale{self.scale:g}"


def cases(*, scales: tuple[float, ...] = (10.0,)) -> Iterator[Case]:
    for dtype, meets in itertools.product(EPSILON, ("all", "same", "other")):
        yield Case(129, 300, 64, dtype, meets)
    yield Case(65, 130, 128, torch.bfloat16, "other", own=False)
    yield Case(70, 33, 33, torch.float16, ids=False)
    yield Case(64, 129, 300, torch.float32, "other")  # rows that stream
    yield Case(130, 70, 256, torch.bfloat16, own=False, ids=False)
    yield Case(1, 1, 8, torch.float32, own=False, ids=False)
    for scale in scales:
        yield Case(129, 200, 96, torch.float32, "other", scale=scale)
        yield Case(129, 200, 64, torch.bfloat16, scale=scale)


def every_case() -> Iterator[Case]:
    """Every architecture, dtype, N and d, in turn "all", "same" and "other"; every M with every N and d."""
    for arch, dtype, (at, n), (column, d) in itertools.product(
        ARCHITECTURES, EPSILON, enumerate(SIZES), enumerate(WIDTHS)
    ):
        meets: tuple[Meets, ...] = ("all", "same", "other")
        m = SIZES[(at * 3 + column) % len(SIZES)]
        yield Case(n, m, d, dtype, meets[(at + column) % 3], own=column % 2 == 0, arch=arch)


class Outcome(NamedTuple):
    """What the kernels gave, what float64 gives and what plain PyTorch does at the case's dtype."""

    got: dict[str, Tensor]
    exact: dict[str, Tensor]
    plain: dict[str, Tensor]
    launches: list[dict[str, Any]]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    torch.manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, case.d), dim=1).to(case.dtype)

    queries, keys = unit(case.n), unit(case.m)
    ids = [torch.randint(-1, 5, (rows,)) if case.ids else None for rows in (case.n, case.m)]
    own = torch.randint(-1, case.m, (case.n,)) if case.own else None
    return queries, keys, ids[0], ids[1], own


def logits(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys with gradients, logits in plain PyTorch, and who meets whom."""
    queries, keys, query_ids, key_ids, own = inputs(case)
    x, y = queries.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()
    zero = torch.zeros(max(case.n, case.m), dtype=torch.int64)
    pairs = Pairs(
        x,
        y,
        zero[: case.n] if query_ids is None else query_ids,
        zero[: case.m] if key_ids is None else key_ids,
        own,
        torch.tensor(case.scale, dtype=dtype),
    )
    return x, y, pairs.scale * (x @ y.T), pairs.tile(case.meets)


def deviations(case: Case, outcome: Outcome) -> dict[str, Deviation]:
    """How far every result is from float64; what is infinite has to be so."""
    found = {}
    for name, want in outcome.exact.items():
        value, want = outcome.got[name].double(), want.detach().double()
        assert torch.equal(value.isfinite(), want.isfinite()), name
        finite = want.isfinite()
        if not finite.any():
            continue
        error = float((value - want)[finite].abs().max())
        plain = float((outcome.plain[name].detach().double() - want)[finite].abs().max())
        size = max(float(want[finite].abs().max()), case.scale)  # where terms cancel, their size counts
        found[name] = Deviation(error, plain, plain + EPSILON[case.dtype] * size)
    return found


def check(case: Case, outcome: Outcome) -> None:
    for name, found in deviations(case, outcome).items():
        assert found.error <= found.most, (name, found)


def masked_logsumexp(s: Tensor, met: Tensor, dim: int) -> Tensor:
    """−inf where nothing is met, with gradient zero."""
    some = met.any(dim)
    lse = torch.where(met, s, -torch.inf).masked_fill(~some.unsqueeze(dim), 0).logsumexp(dim)
    return torch.where(some, lse, -torch.inf)


def run_logsumexp(case: Case) -> Outcome:
    grad = torch.rand(case.n)
    results = []
    for dtype in (torch.float64, case.dtype):
        x, y, s, met = logits(case, dtype)
        lse = masked_logsumexp(s, met, 1)
        torch.where(met.any(1), lse * grad.to(dtype), 0).sum().backward()
        results.append({"lse": lse, "grad_queries": x.grad, "grad_keys": y.grad})
    with PairPasses(*inputs(case), scale=case.scale, meets=case.meets, arch=case.arch) as passes:
        return Outcome(passes.logsumexp(grad), *results, passes.device.launches())


def run_two_way(case: Case) -> Outcome:
    grad_rows, grad_columns = torch.rand(case.n), torch.rand(case.m)
    results = []
    for dtype in (torch.float64, case.dtype):
        x, y, s, met = logits(case, dtype)
        rows, columns = masked_logsumexp(s, met, 1), masked_logsumexp(s, met, 0)
        total = torch.where(met.any(1), rows * grad_rows.to(dtype), 0).sum()
        (total + torch.where(met.any(0), columns * grad_columns.to(dtype), 0).sum()).backward()
        results.append({"rows": rows, "columns": columns, "grad_queries": x.grad, "grad_keys": y.grad})
    with PairPasses(*inputs(case), scale=case.scale, meets=case.meets, arch=case.arch) as passes:
        return Outcome(passes.two_way(grad_rows, grad_columns), *results, passes.device.launches())


def run_softplus(case: Case) -> Outcome:
    grad, offset = torch.rand(case.n), torch.randn(case.n) - 3
    results = []
    for dtype in (torch.float64, case.dtype):
        x, y, s, met = logits(case, dtype)
        offsets = offset.to(dtype).requires_grad_()
        total = torch.where(met, torch.nn.functional.softplus(s + offsets[:, None]), 0).sum(1)
        (total * grad.to(dtype)).sum().backward()
        gradients = {"grad_queries": x.grad, "grad_keys": y.grad, "grad_offset": offsets.grad}
        results.append({"total": total, **gradients})
    with PairPasses(*inputs(case), scale=case.scale, meets=case.meets, arch=case.arch) as passes:
        return Outcome(passes.softplus(offset, grad), *results, passes.device.launches())


PASSES: dict[str, Callable[[Case], Outcome]] = {
    "logsumexp": run_logsumexp,
    "two-way": run_two_way,
    "softplus": run_softplus,
}


@pytest.mark.parametrize("case", list(cases(scales=(1000.0,))), ids=str)
def test_logsumexp(case: Case) -> None:
    check(case, run_logsumexp(case))


@pytest.mark.parametrize("case", list(cases(scales=(1000.0,))), ids=str)
def test_two_way(case: Case) -> None:
    outcome = run_two_way(case)
    check(case, outcome)
    if case.meets != "same" and case.scale < 60:  # one exponential a pair serves both directions
        forward = next(
            r for r in outcome.launches if "similarity" in r["kernel"] or "streamed" in r["kernel"]
        )
        blocks = -(-case.n // (64 if case.dtype == torch.float32 else 128))
        rows = min(case.n + 31, blocks * 128) // 32 * 32
        assert forward["class_lanes"]["mufu"] <= rows * (case.m + 63)


@pytest.mark.parametrize("case", list(cases(scales=(-10.0,))), ids=str)
def test_softplus(case: Case) -> None:
    check(case, run_softplus(case))


def test_rows_that_meet_nothing() -> None:
    ids = torch.tensor([3, -1, 4])
    case = Case(3, 5, 8, torch.float32)
    queries, keys, _, key_ids, _ = inputs(case)
    assert key_ids is not None
    with PairPasses(queries, keys, ids, torch.full((5,), 3), None, meets="same") as passes:
        lse = passes.logsumexp(torch.full((3,), torch.nan).masked_fill(ids == 3, 1.0))
        both = passes.two_way(torch.ones(3), torch.ones(5))
    assert lse["lse"].isfinite().tolist() == [True, False, False]
    assert lse["grad_keys"].isfinite().all()
    assert both["rows"].isfinite().tolist() == [True, False, False]
    assert both["columns"].isfinite().all()
    assert both["grad_queries"][1:].abs().max() == 0


def test_ignored_rows_may_hold_anything() -> None:
    """NaN in a query or key without an id reaches no result: sums over columns leave it out."""
    case = Case(65, 130, 64, torch.bfloat16)
    queries, keys, query_ids, key_ids, own = inputs(case)
    assert query_ids is not None
    assert key_ids is not None
    results = []
    for fill in (0.0, torch.nan):
        x = queries.masked_fill((query_ids == -1)[:, None], fill)
        y = keys.masked_fill((key_ids == -1)[:, None], fill)
        with PairPasses(x, y, query_ids, key_ids, own) as passes:
            results.append(passes.two_way(torch.ones(65), torch.ones(130)))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_no_keys() -> None:
    ptxsim()
    queries = torch.randn(3, 8)
    with PairPasses(queries, queries[:0]) as passes:
        assert (passes.logsumexp(torch.ones(3))["lse"] == -torch.inf).all()
        assert (passes.two_way(torch.ones(3), torch.ones(0))["rows"] == -torch.inf).all()
        assert passes.softplus(torch.zeros(3), torch.ones(3))["total"].abs().max() == 0
