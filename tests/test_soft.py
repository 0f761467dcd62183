"""Soft positives: every affinity by every implementation against its definition, and by its formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from wscl_fast import _ops
from wscl_fast import affinity as affinities
from wscl_fast.functional import clustered_infonce, conditional_factors, soft_infonce

IMPLS = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])
TAGS = ["shared", "count", "jaccard", "cosine"]
AFFINITIES = [*TAGS, "kernel"]


def auxiliary(affinity: str, rows: int, generator: torch.Generator, words: int = 2) -> Tensor:
    """A few tags of many, some samples without any, the sign bit among them; or vectors."""
    if affinity == "kernel":
        return torch.rand(rows, 5, generator=generator, dtype=torch.float64)
    tags = torch.randint(0, 64 * words, (rows, 3), generator=generator)
    tags[:, 0] = tags[:, 0] % 4 * 21  # bits 0, 21, 42, 63
    masks = [[0] * words for _ in range(rows)]
    for mask, sample in zip(masks, tags.tolist(), strict=True):
        for tag in sample:
            mask[tag // 64] |= 1 << tag % 64
    signed = [[word - (1 << 64) if word >> 63 else word for word in mask] for mask in masks]
    result = torch.tensor(signed, dtype=torch.int64).view(rows, words)
    result[torch.rand(rows, generator=generator) < 0.1] = 0
    return result


def problem(
    affinity: str, n: int, m: int | None, d: int = 6, seed: int = 0, words: int = 2
) -> tuple[list[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(n, d, generator=g, dtype=torch.float64)]
    known: dict[str, Any] = {"query_auxiliary": auxiliary(affinity, n, g, words), "affinity": affinity}
    if m is not None:
        leaves.append(torch.randn(m, d, generator=g, dtype=torch.float64))
        known["key_auxiliary"] = auxiliary(affinity, m, g, words)
    return leaves, known


def values(leaves: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
    t = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    rows = soft_infonce(*leaves, temperature=t, reduction="none", **options)
    upstream = torch.linspace(0.5, 1.5, len(rows), dtype=dtype)
    return [rows.detach(), *torch.autograd.grad((rows * upstream).sum(), [*leaves, t])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_float64_is_the_definition(affinity: str, positives: str, impl: str) -> None:
    g = torch.Generator().manual_seed(1)
    for m, extra in itertools.product((None, 70), ({}, {"exclude_self": False}, {"key_valid": True})):
        leaves, known = problem(affinity, 40, m)
        options = {**known, **extra, "positives": positives}
        if "key_valid" in options:
            options["key_valid"] = torch.rand(m or 40, generator=g) < 0.7
        if m and not extra:
            options["exclude_self"] = torch.randint(-1, m, (40,), generator=g)
        want = values(leaves, torch.float64, impl="reference", **options)
        for got, right in zip(values(leaves, torch.float64, impl=impl, **options), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_float32_is_as_exact_as_plain_pytorch(affinity: str, positives: str, impl: str) -> None:
    leaves, known = problem(affinity, 127, 600, d=33)
    options = {**known, "positives": positives, "exclude_self": torch.arange(127)}
    exact = values(leaves, torch.float64, impl="reference", **options)
    plain = values(leaves, torch.float32, impl="reference", **options)
    ours = values(leaves, torch.float32, impl=impl, **options)
    for got, rival, want in zip(ours, plain, exact, strict=True):
        error, rivals = ((x.double() - want).abs().max() for x in (got, rival))
        assert error <= rivals + 2e-6 * want.abs().max()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 30),
    m=st.one_of(st.none(), st.integers(0, 60)),
    d=st.integers(1, 40),
    affinity=st.sampled_from(AFFINITIES),
    positives=st.sampled_from(["out", "in"]),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(n: int, m: int | None, d: int, affinity: str, positives: str, seed: int) -> None:
    leaves, known = problem(affinity, n, m, d, seed)
    want = values(leaves, torch.float64, impl="reference", positives=positives, **known)
    for impl in IMPLS:
        for got, right in zip(
            values(leaves, torch.float64, impl=impl, positives=positives, **known), want, strict=True
        ):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_affinities_by_their_formulas(impl: str) -> None:
    sets = [{0, 5}, {5, 63}, {63, 64, 100}, {7}, set(), {0, 5, 63}, {64}]
    masks = []
    for tags in sets:
        words = [sum(1 << t % 64 for t in tags if t // 64 == w) for w in range(2)]
        masks.append([w - (1 << 64) if w >> 63 else w for w in words])
    formulas = {
        "shared": lambda a, b: float(bool(a & b)),
        "count": lambda a, b: len(a & b),
        "jaccard": lambda a, b: len(a & b) / max(len(a | b), 1),
        "cosine": lambda a, b: len(a & b) / max(len(a) * len(b), 1) ** 0.5,
    }
    x = torch.randn(7, 4, dtype=torch.float64)
    s = (x @ x.T / 0.5).fill_diagonal_(-torch.inf)
    for affinity, formula in formulas.items():
        w = torch.tensor([[float(formula(a, b)) for b in sets] for a in sets], dtype=torch.float64)
        w.fill_diagonal_(0)
        some = w.sum(1) > 0
        assert some.tolist() == [True, True, True, False, False, True, True]
        safe = s.clone().fill_diagonal_(0)
        want = {
            "out": (s.logsumexp(1) - (w * safe).sum(1) / w.sum(1))[some].mean(),
            "in": (s.logsumexp(1) - (w * s.exp()).sum(1).log() + w.sum(1).log())[some].mean(),
        }
        for positives, right in want.items():
            got = soft_infonce(
                x,
                query_auxiliary=torch.tensor(masks),
                affinity=affinity,
                temperature=0.5,
                positives=positives,
                impl=impl,
            )
            torch.testing.assert_close(got, right)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_one_tag_each_is_a_clustering(positives: str, impl: str) -> None:
    x, ids = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 6, (30,))
    want = clustered_infonce(x, query_clusters=ids, positives=positives)
    masks = 1 << (ids * 10)
    for affinity in TAGS:
        got = soft_infonce(x, query_auxiliary=masks, affinity=affinity, positives=positives, impl=impl)
        torch.testing.assert_close(got, want)
    one_hot = torch.nn.functional.one_hot(ids).double()
    got = soft_infonce(x, query_auxiliary=one_hot, affinity="kernel", positives=positives, impl=impl)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_conditional_kernels_are_ccl_k(impl: str) -> None:
    """The weights of the paper by the inverse of the whole kernel matrix."""
    x, y = normalize(torch.randn(2, 20, 4, dtype=torch.float64), dim=-1)
    z = torch.rand(20, 3, dtype=torch.float64)
    kernel = z @ z.T
    w = torch.linalg.inv(kernel + 0.1 * torch.eye(20)) @ kernel
    s = x @ y.T / 0.5
    rows = s.logsumexp(1) - (s.exp() * w).sum(1).log() + w.sum(1).log()
    u = conditional_factors(z, 0.1)
    torch.testing.assert_close(u @ u.T, w)
    got = soft_infonce(x, y, query_auxiliary=u, affinity="kernel", positives="in", temperature=0.5, impl=impl)
    assert (w < 0).any()
    torch.testing.assert_close(got, rows.mean())


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_nothing_in_common(affinity: str, positives: str, impl: str) -> None:
    empty = torch.zeros(5, 2, dtype=torch.float64 if affinity == "kernel" else torch.int64)
    alone = torch.eye(5, dtype=torch.float64) if affinity == "kernel" else 1 << torch.arange(5)
    for known in (empty, alone):
        x = torch.randn(5, 3, requires_grad=True)
        loss = soft_infonce(x, query_auxiliary=known, affinity=affinity, positives=positives, impl=impl)
        loss.backward()
        assert loss == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_empty_slots_may_hold_anything(affinity: str, impl: str) -> None:
    (x, k), known = problem(affinity, 10, 30)
    valid = torch.arange(30) < 20
    garbage = torch.where(valid[:, None], k, 1e6)
    cut = {**known, "key_auxiliary": known["key_auxiliary"][:20]}
    for positives in ("out", "in"):
        got = soft_infonce(x, garbage, key_valid=valid, positives=positives, impl=impl, **known)
        torch.testing.assert_close(got, soft_infonce(x, k[:20], positives=positives, **cut))


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_derivatives(impl: str, positives: str, affinity: str) -> None:
    leaves, known = problem(affinity, 5, 7, d=3)
    leaves = [x.requires_grad_() for x in leaves]

    def loss(*x: Tensor) -> Tensor:
        return soft_infonce(*x, temperature=0.8, positives=positives, impl=impl, **known)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_compiles_without_a_graph_break(affinity: str, impl: str) -> None:
    leaves, known = problem(affinity, 12, 20)
    leaves = [x.requires_grad_() for x in leaves]

    def loss(*x: Tensor) -> Tensor:
        return soft_infonce(*x, impl=impl, **known)

    torch.compiler.reset()
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_nan_in_a_vector_is_nan_in_the_rows_that_it_touches(impl: str, positives: str, within: bool) -> None:
    """In a query's vector in its row; in a key's, which all queries meet, in every row."""
    (q, *keys), known = problem("kernel", 8, None if within else 20)
    known["query_auxiliary"][3, 1] = torch.nan
    options = {"positives": positives, "impl": impl, **known}
    q.requires_grad_()
    rows = soft_infonce(q, *keys, reduction="none", **options)
    (gradient,) = torch.autograd.grad(rows.sum(), q)
    touched = torch.full((8,), within)
    touched[3] = True
    assert rows.isnan().equal(touched)
    assert gradient.isnan().any(1).equal(touched)
    assert soft_infonce(q, *keys, **options).isnan()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator(dtype: torch.dtype, jaccard: bool) -> None:
    """PyTorch's checks, derivatives of any order, and the definition at widths around the vectors' own."""
    g = torch.Generator().manual_seed(0)
    affinity = "jaccard" if jaccard else "shared"
    for n, m, d, words in (
        (1, 1, 1, 1),
        (5, 300, 33, 2),
        (19, 700, 64, 1),
        (40, 9, 130, 3),
        (0, 4, 3, 1),
        (4, 0, 3, 1),
    ):
        rows, columns = (auxiliary(affinity, count, g, words) for count in (n, m))
        values = torch.randn(m, 2 * d, generator=g, dtype=torch.float64).to(dtype)[:, :d]
        sums, totals = _ops.tag_weighted_sum(rows, columns, values, jaccard=jaccard)
        w = affinities.weights(affinity, rows, columns, torch.float64)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(sums.double(), w @ values.double(), **tolerance)
        torch.testing.assert_close(totals, w.sum(1))
        torch.library.opcheck(torch.ops.wscl_fast.tag_weighted_sum.default, (rows, columns, values, jaccard))
    if dtype == torch.float64:
        rows, columns = auxiliary(affinity, 6, g), auxiliary(affinity, 9, g)
        v = torch.randn(9, 4, dtype=dtype, requires_grad=True)

        def sums_of(v: Tensor) -> Tensor:
            return _ops.tag_weighted_sum(rows, columns, v, jaccard=jaccard)[0]

        assert torch.autograd.gradcheck(sums_of, v)
        assert torch.autograd.gradgradcheck(sums_of, v)


def test_every_instruction_set_and_number_of_threads(extension) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    rows, columns = auxiliary("jaccard", 90, g), auxiliary("jaccard", 1000, g)
    values = torch.randn(1000, 50, generator=g)
    want = affinities.weights("jaccard", rows, columns, torch.float64) @ values.double()
    before, threads = extension.instruction_set(), torch.get_num_threads()
    try:
        for name in extension.supported_instruction_sets():
            extension.use_instruction_set(name)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(_ops.tag_weighted_sum(rows, columns, values, jaccard=True)[0])
            assert results[0].equal(results[1])
            assert results[0].equal(results[2])
            torch.testing.assert_close(results[0].double(), want, rtol=1e-5, atol=1e-5)
    finally:
        extension.use_instruction_set(before)
        torch.set_num_threads(threads)


def largest_of(leaves: list[Tensor], known: dict[str, Any]) -> int:
    """How many numbers the largest tensor has that forward and backward make, by any implementation."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return out

    leaves = [x.requires_grad_() for x in leaves]
    for impl in IMPLS:
        with Watch():
            soft_infonce(*leaves, impl=impl, **known).backward()
    return largest


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_no_matrix_of_all_pairs(affinity: str) -> None:
    assert largest_of(*problem(affinity, 3000, 9000, d=4)) <= 1024 * 4096 + 4096


@pytest.mark.parametrize("d", [16, 400])  # keys as they are, and so many that kernels take them in blocks
@pytest.mark.parametrize("affinity", ["count", "cosine"])
def test_many_tags_are_spread_out_some_rows_at_a_time(affinity: str, d: int) -> None:
    """1024 of them, which take more than a row itself does."""
    leaves, known = problem(affinity, 1100, 4096, d=d, words=16)
    assert largest_of(leaves, known) <= max(leaves[1].numel(), 256 * 2048)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"affinity": "some"}, ValueError, "affinity: expected one of 'shared'"),
        ({"query_auxiliary": [1]}, TypeError, "query_auxiliary: expected a tensor, got list"),
        ({"query_auxiliary": torch.zeros(4)}, TypeError, "query_auxiliary: expected int64 bit masks"),
        ({"affinity": "kernel"}, TypeError, "query_auxiliary: expected a floating-point dtype for a kernel"),
        (
            {"affinity": "kernel", "query_auxiliary": torch.zeros(4)},
            ValueError,
            "query_auxiliary: expected a matrix",
        ),
        ({"query_auxiliary": torch.arange(4).to_sparse()}, TypeError, "query_auxiliary: expected a dense"),
        (
            {"affinity": "kernel", "query_auxiliary": torch.ones(4, 2).to_sparse()},
            TypeError,
            "query_auxiliary: expected a dense tensor, got torch.sparse_coo",
        ),
        ({"query_auxiliary": torch.arange(3)}, ValueError, r"query_auxiliary: expected shape \(4, 1\)"),
        ({"keys": torch.randn(5, 3)}, ValueError, r"key_auxiliary: expected shape \(5, 1\), got \(4, 1\)"),
        ({"key_valid": torch.ones(4)}, TypeError, "key_valid: expected bool"),
        ({"key_valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"key_valid: expected shape \(4,\)"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\)"),
        ({"positives": "both"}, ValueError, "positives: expected one of"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"queries": torch.randn(4, 3), "query_auxiliary": torch.arange(4), "affinity": "shared"}
    with pytest.raises(error, match=message):
        soft_infonce(**{**good, **change})
    with pytest.raises(ValueError, match="ridge: expected a finite number above 0, got 0"):
        conditional_factors(torch.randn(4, 2), 0)
    with pytest.raises(TypeError, match="vectors: expected a floating-point dtype"):
        conditional_factors(torch.arange(4)[:, None])


@pytest.mark.parametrize(
    ("vectors", "ridge", "error", "message"),
    [
        (torch.full((4, 2), torch.nan), 0.1, ValueError, "vectors: expected finite numbers, .* in row 0"),
        (torch.tensor([[1.0], [torch.inf]]), 0.1, ValueError, "vectors: expected finite numbers, .* row 1"),
        (torch.full((8, 3), 1e4), 1e-12, ValueError, r"ridge: expected .* beside 8e\+08.* got 1e-12"),
        (torch.ones(8, 3).to_sparse(), 0.1, TypeError, "vectors: expected a dense tensor, got torch.sparse"),
        (torch.ones(8, 3).to(torch.float8_e4m3fn), 0.1, TypeError, "vectors: expected float32, .* got"),
    ],
)
def test_factors_refuse_what_has_none(
    vectors: Tensor, ridge: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        conditional_factors(vectors, ridge)
