"""The CUDA core's clustered InfoNCE, run in the simulator, against the float64 definition.

The rule for every number: no further from float64 than plain PyTorch at the same dtype is, plus a small
epsilon. Here runs a covering part of the cases; ``make simulate`` runs them all (matrix.py).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from simulated_infonce import Results, run, run_reduced
from torch import Tensor

from wscl_fast import reference
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.simulated
IN_FULL = pytest.mark.skipif(
    os.environ.get("WSCL_SIMULATE") != "all", reason="make simulate: nvcc compiles for each architecture"
)

ARCHITECTURES = ("80", "90", "100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 63, 64, 65, 127, 128, 129, 300)
WIDTHS = (8, 40, 64, 96, 128, 200, 256, 768)
# A weight's own rounding, and what float32's sums may differ by.
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


@dataclass(frozen=True)
class Case:
    """A problem; ``m=None`` is the in-batch case."""

    n: int
    m: int | None
    d: int
    dtype: torch.dtype
    inner: bool = False
    own: bool = False
    exclude_self: bool = True
    scale: float = 10.0
    clusters: int = 5
    ignored: bool = True
    fast: bool = False
    magnitude: float = 1.0
    arch: str = "90"

    def __str__(self) -> str:
        extra = [name for name in ("own", "fast") if getattr(self, name)]
        if self.scale != 10:
            extra.append(f"scale{self.scale:g}")
        shape = f"{self.n}x{'self' if self.m is None else self.m}x{self.d}"
        positives = "in" if self.inner else "out"
        return "-".join([f"sm{self.arch}", str(self.dtype)[6:], positives, shape, *extra])


def every_case() -> Iterator[Case]:
    """Every architecture, precision, kind of positives, N and d; every M with every N and with every d."""
    precisions = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]
    for arch, (dtype, fast), inner, (at, n), d in itertools.product(
        ARCHITECTURES, precisions, (False, True), enumerate(SIZES), WIDTHS
    ):
        m = SIZES[(at * 3 + WIDTHS.index(d)) % len(SIZES)]
        yield Case(n, m, d, dtype, inner=inner, own=True, arch=arch, fast=fast)
        yield Case(n, None, d, dtype, inner=inner, arch=arch, fast=fast)


def covering_cases() -> Iterator[Case]:
    for dtype, inner in itertools.product(DTYPES, (False, True)):
        yield Case(65, 300, 64, dtype, inner=inner, own=True)
        yield Case(129, None, 128, dtype, inner=inner)
    for dtype in DTYPES:
        yield Case(127, 65, 200 if dtype != torch.float32 else 96, dtype)
        yield Case(70, None, 33, dtype, exclude_self=False)  # rows that are not aligned
        yield Case(1, 1, 8, dtype, clusters=1, ignored=False)
        yield Case(300, 400, 8, dtype, clusters=1, ignored=False)  # a segment of more than one chunk
        yield Case(64, 63, 40, dtype, clusters=10**6)  # hardly a positive
        yield Case(65, 70, 300, dtype, own=True)  # rows that stream
        yield Case(33, None, 300, dtype, inner=True)


def special_cases() -> Iterator[Case]:
    yield Case(65, 130, 64, torch.float32, fast=True)
    yield Case(65, 130, 64, torch.float16, scale=200)  # one logit outgrows the others
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(65, 130, 64, dtype, scale=1000)
        yield Case(65, 300, 64, dtype, scale=1000, magnitude=3, own=True)
        yield Case(129, None, 64, dtype, scale=1000)  # rows too far apart for one shift


def arguments(case: Case) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor]:
    torch.manual_seed(0)

    def vectors(rows: int) -> Tensor:
        unit = torch.nn.functional.normalize(torch.randn(rows, case.d), dim=1)
        return (case.magnitude * unit).to(case.dtype)

    def ids(rows: int) -> Tensor:
        return torch.randint(-1 if case.ignored else 0, case.clusters, (rows,))

    queries, zq, upstream = vectors(case.n), ids(case.n), torch.randn(case.n)
    if case.m is None:
        return queries, None, zq, None, None, upstream
    own = torch.randint(-1, case.m, (case.n,)) if case.own else None
    return queries, vectors(case.m), zq, ids(case.m), own, upstream


def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What plain PyTorch gives, computed in a dtype."""
    queries, keys, zq, zk, own, upstream = arguments(case)
    x = queries.to(dtype).requires_grad_()
    y = x if keys is None else keys.to(dtype).requires_grad_()
    scale = torch.tensor(case.scale, dtype=dtype, requires_grad=True)
    if keys is None and case.exclude_self:
        own = torch.arange(case.n)
    pairs = Pairs(x, y, zq, zq if zk is None else zk, own, scale)
    loss, count = reference.clustered_infonce(pairs, pairs, inner=case.inner)
    (loss.double() * upstream.double()).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    wanted = {"loss": loss, "count": count, "grad_queries": x.grad, "grad_scale": scale.grad[None]}
    if keys is not None:
        assert y.grad is not None
        wanted["grad_keys"] = y.grad
    return {name: value.detach().double() for name, value in wanted.items()}


@dataclass(frozen=True)
class Deviation:
    """Of one result: its largest error, plain PyTorch's, and the most that is allowed."""

    error: float
    plain: float
    most: float


def deviations(case: Case, got: Results) -> dict[str, Deviation]:
    """How far every result is from float64; counts have to be exact, and everything finite."""
    exact, plain = expected(case, torch.float64), expected(case, case.dtype)
    epsilon = 1e-4 if case.fast else EPSILON[case.dtype]
    assert torch.equal(got.count.double(), exact["count"])
    found = {}
    for name, want in exact.items():
        value = getattr(got, name).double()
        assert value.shape == want.shape
        assert value.isfinite().all(), name
        error, allowed = (value - want).abs().max(), (plain[name] - want).abs().max()
        # Where terms cancel, what counts is their size: logits, and vectors times the scale.
        size = want.abs().max()
        if name == "loss":
            size = size.clamp(min=case.scale * case.magnitude**2)
        elif name == "grad_scale":
            size = size.clamp(min=float(arguments(case)[-1].abs().sum()) * case.magnitude**2)
        elif name.startswith("grad"):
            queries, *_, upstream = arguments(case)
            size = size.clamp(min=case.scale * float(upstream.abs().max()) * float(queries.abs().max()))
        found[name] = Deviation(float(error), float(allowed), float(allowed + epsilon * size + 1e-30))
    return found


def simulate(case: Case) -> Results:
    queries, keys, zq, zk, own, upstream = arguments(case)
    return run(
        queries,
        keys,
        zq,
        zk,
        own,
        scale=case.scale,
        exclude_self=case.exclude_self,
        inner=case.inner,
        grad_loss=upstream,
        fast=case.fast,
        arch=case.arch,
    )


def check(case: Case) -> None:
    for name, found in deviations(case, simulate(case)).items():
        assert found.error <= found.most, (name, found)


@pytest.mark.parametrize("case", list(covering_cases()), ids=str)
def test_matches_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", list(special_cases()), ids=str)
def test_hard_numbers(case: Case) -> None:
    check(case)


def test_loss_alone() -> None:
    """Without a gradient there is one product a pair, and no direction."""
    case = Case(65, 192, 64, torch.bfloat16)  # whole tiles of either width
    queries, keys, zq, zk, own, _ = arguments(case)
    got = run(queries, keys, zq, zk, own, scale=case.scale)
    assert torch.allclose(got.loss.double(), expected(case, torch.float64)["loss"], atol=1e-5)
    with_gradient = run(
        queries, keys, zq, zk, own, scale=case.scale, grad_loss=torch.ones(65), need_keys=False
    )
    ones, twos = (sum(r["classes"].get("mma", 0) for r in x.launches) for x in (got, with_gradient))
    assert twos == 2 * ones


def test_ignored_rows_may_hold_anything() -> None:
    """An empty slot of a queue is no one's negative, whatever lies in it."""
    case = Case(65, 130, 64, torch.float32)
    queries, keys, zq, zk, _, upstream = arguments(case)
    assert keys is not None
    assert zk is not None
    clean = run(queries, keys, zq, zk, grad_loss=upstream)
    dirty = run(queries, keys.masked_fill((zk == -1)[:, None], torch.nan), zq, zk, grad_loss=upstream)
    for name in ("loss", "grad_queries", "grad_keys", "grad_scale"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
    # A query without an id has no say either; other shifts are taken beside it.
    spoilt = queries.masked_fill((zq == -1)[:, None], torch.nan)
    assert spoilt.isnan().any()
    for others in ((keys, zq, zk), (None, zq, None)):
        clean, dirty = (run(rows, *others, grad_loss=upstream) for rows in (queries, spoilt))
        for name in ("loss", "grad_queries", "grad_scale"):
            torch.testing.assert_close(getattr(dirty, name), getattr(clean, name), rtol=1e-5, atol=1e-6)


def test_same_bits_every_time() -> None:
    case = Case(129, 300, 64, torch.bfloat16, own=True)
    queries, keys, zq, zk, own, upstream = arguments(case)
    first, second = (run(queries, keys, zq, zk, own, grad_loss=upstream) for _ in range(2))
    for name in ("loss", "grad_queries", "grad_keys", "grad_scale"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize(
    "arch", ["90", pytest.param("80", marks=IN_FULL), pytest.param("100", marks=IN_FULL)]
)
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("in_batch", [False, True], ids=["keys", "batch"])
@pytest.mark.parametrize(
    ("dtype", "inner", "sorted_before"),
    [
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.float16, True, True),
        (torch.float32, False, True),
    ],
)
def test_a_reduced_loss(
    dtype: torch.dtype, inner: bool, sorted_before: bool, in_batch: bool, mean: bool, arch: str
) -> None:
    """It is the mean or the sum of the rows', and its gradients are theirs, to the bit."""
    case = Case(129, None if in_batch else 70, 40, dtype, inner=inner, own=not in_batch, arch=arch)
    queries, keys, zq, zk, own, _ = arguments(case)
    got = run_reduced(
        queries,
        keys,
        zq,
        zk,
        own,
        mean=mean,
        inner=inner,
        upstream=0.75,
        sorted_before=sorted_before,
        arch=arch,
    )
    anchors = int((got.count > 0).sum())
    assert anchors > 50
    share = torch.tensor(1 / anchors if mean else 1.0)
    upstream = (0.75 * share).expand(129).contiguous()
    want = run(queries, keys, zq, zk, own, inner=inner, grad_loss=upstream, arch=arch)
    total = want.loss.double().sum() / (anchors if mean else 1)
    torch.testing.assert_close(got.loss[0].double(), total, rtol=2**-23, atol=0)
    for name in ("count", "grad_queries", "grad_keys", "grad_scale"):
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (5, 5)])
def test_a_reduced_loss_without_a_positive(n: int, m: int) -> None:
    zq, zk = torch.arange(n), torch.arange(m) + 10
    got = run_reduced(torch.randn(n, 8), torch.randn(m, 8), zq, zk)
    assert float(got.loss) == 0
    assert not got.count.any()
    for name in ("grad_queries", "grad_keys", "grad_scale"):
        assert not getattr(got, name).any(), name


def test_no_rows() -> None:
    torch.manual_seed(0)
    ids = torch.zeros(5, dtype=torch.int64)
    some, none = torch.randn(5, 8), torch.empty(0, 8)
    got = run(some, none, ids, ids[:0], grad_loss=torch.ones(5))
    assert got.loss.abs().max() == 0
    assert got.grad_queries is not None
    assert got.grad_queries.abs().max() == 0
    got = run(none, some, ids[:0], ids, grad_loss=torch.ones(0))
    assert got.grad_keys is not None
    assert got.grad_keys.abs().max() == 0
