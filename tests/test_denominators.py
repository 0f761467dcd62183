"""What a positive is told apart from: every denominator, by every implementation, against its definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, problem
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from wscl_fast import _ops
from wscl_fast.functional import clustered_infonce

IMPLS = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])
VARIANTS = [
    {"denominator": denominator, "positives": positives, "hardness": hardness, "prior": prior}
    for denominator, positives, hardness, prior in itertools.product(
        ("all", "other", "decoupled"), ("out", "in"), (0.0, 0.7), (0.0, 0.1)
    )
]


def with_samples(case: Problem, seed: int = 0) -> Problem:
    """Sample ids under the clusters: about three rows of one cluster are views of one sample."""
    generator = torch.Generator().manual_seed(seed)
    n = len(case.queries)
    ids = {"query_samples": torch.randint(-1, max(n // 3, 1), (n,), generator=generator)}
    if case.keys is not None:
        ids["key_samples"] = torch.randint(-1, max(n // 3, 1), (len(case.keys),), generator=generator)
    return Problem(case.queries, case.keys, case.temperature, {**case.options, **ids})


def values(case: Problem, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves, arguments = case.arguments(dtype)
    loss = clustered_infonce(**{**arguments, **options}, reduction="none")
    upstream = torch.linspace(0.5, 1.5, len(loss), dtype=dtype)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_float64_is_the_definition(variant: dict[str, Any], impl: str) -> None:
    for m, exclude in ((None, None), (None, False), (90, None), (90, "own")):
        plain = problem(60, m, 12, exclude=exclude, temperature=0.3)
        for case in (plain, with_samples(plain)):
            want = values(case, torch.float64, impl="reference", **variant)
            for got, right in zip(values(case, torch.float64, impl=impl, **variant), want, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_float32_is_as_exact_as_plain_pytorch(variant: dict[str, Any], impl: str) -> None:
    for temperature, magnitude in ((0.1, 1.0), (0.05, 0.3)):
        case = problem(127, 129, 40, exclude="own", temperature=temperature, magnitude=magnitude)
        exact = values(case, torch.float64, impl="reference", **variant)
        plain = values(case, torch.float32, impl="reference", **variant)
        for got, rival, want in zip(
            values(case, torch.float32, impl=impl, **variant), plain, exact, strict=True
        ):
            error, rivals = ((x.double() - want).abs().max() for x in (got, rival))
            assert error <= 1.5 * rivals + 4e-6 * want.abs().max() / temperature**0.5


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 40),
    m=st.one_of(st.none(), st.integers(0, 80)),
    d=st.integers(1, 20),
    clusters=st.integers(1, 30),
    temperature=st.floats(0.005, 10),
    variant=st.sampled_from([v for v in VARIANTS if not v["prior"]]),
    samples=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    n: int,
    m: int | None,
    d: int,
    clusters: int,
    temperature: float,
    variant: dict[str, Any],
    samples: bool,
    seed: int,
) -> None:
    case = problem(n, m, d, clusters=clusters, temperature=temperature, seed=seed)
    case = with_samples(case, seed) if samples else case
    want = values(case, torch.float64, impl="reference", **variant)
    for impl in IMPLS:
        for got, right in zip(values(case, torch.float64, impl=impl, **variant), want, strict=True):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_any_finite_input_gives_a_finite_result(variant: dict[str, Any], impl: str) -> None:
    """One cluster, all singletons, no id, zeros, duplicates, logits of ±1e4."""
    if impl == "reference" and variant["prior"]:
        pytest.skip("the definition of the debiased loss takes exponentials as they are")
    for ids in (torch.zeros(12), torch.arange(12), torch.full((12,), -1), torch.arange(12) // 2):
        for x in (torch.randn(12, 5), torch.zeros(12, 5), torch.ones(12, 5), 100 * torch.randn(12, 5)):
            x = x.clone().requires_grad_()
            loss = clustered_infonce(x, query_clusters=ids.long(), temperature=1.0, impl=impl, **variant)
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(x.grad).all()
            if ids.unique().numel() == 12 or (ids == -1).all():
                assert loss == 0
                assert (x.grad == 0).all()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("denominator", ["all", "other", "decoupled"])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_second_derivatives(impl: str, denominator: str, positives: str) -> None:
    q, k = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    qc, kc = torch.tensor([0, 0, 1, 2, -1]), torch.tensor([0, 1, 1, 0, 2, -1, 3])

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return clustered_infonce(
            q,
            k,
            query_clusters=qc,
            key_clusters=kc,
            temperature=t,
            denominator=denominator,
            positives=positives,
            hardness=0.5,
            impl=impl,
        )

    assert torch.autograd.gradcheck(loss, (q, k, t))
    assert torch.autograd.gradgradcheck(loss, (q, k, t))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_other_is_nt_xent_with_several_positives(impl: str) -> None:
    """Each positive pair against the negatives alone; weights |P(i)| make the mean one over pairs."""
    x, ids = normalize(torch.randn(40, 8, dtype=torch.float64), dim=1), torch.randint(0, 6, (40,))
    s = x @ x.T / 0.2
    same = ids[:, None] == ids
    positive = same & ~torch.eye(40, dtype=torch.bool)
    terms = [
        -torch.log(s[i, j].exp() / (s[i, j].exp() + s[i, ~same[i]].exp().sum()))
        for i, j in positive.nonzero().tolist()
    ]
    got = clustered_infonce(
        x,
        query_clusters=ids,
        temperature=0.2,
        denominator="other",
        weights=positive.sum(1).double(),
        impl=impl,
    )
    torch.testing.assert_close(got, torch.stack(terms).mean())


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_decoupled_is_dcl(impl: str) -> None:
    a, b = normalize(torch.randn(2, 20, 8, dtype=torch.float64), dim=-1)
    s = a @ b.T / 0.2
    off = s.masked_fill(torch.eye(20, dtype=torch.bool), -math.inf)
    want = (off.logsumexp(1) - s.diagonal()).mean()
    ids = torch.arange(20)
    got = clustered_infonce(a, b, query_clusters=ids, temperature=0.2, denominator="decoupled", impl=impl)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(("hardness", "prior"), [(0.0, 0.1), (1.0, 0.0), (0.5, 0.1), (0.0, 0.9)])
def test_hardness_and_prior_are_the_papers(impl: str, hardness: float, prior: float) -> None:
    """The estimator as Robinson et al. write it, one positive a row: exponentials, clamp and all."""
    x = normalize(torch.randn(16, 2, 6, dtype=torch.float64), dim=-1).flatten(0, 1)
    t, ids = 0.5, torch.arange(16).repeat_interleave(2)
    e = (x @ x.T / t).exp()
    positive = e[torch.arange(32), torch.arange(32) ^ 1]
    negative = e[ids[:, None] != ids].view(32, 30)
    importance = negative**hardness
    weighted = (importance * negative).sum(1) / importance.mean(1)
    mass = ((weighted - prior * 30 * positive) / (1 - prior)).clamp(min=30 * math.exp(-1 / t))
    want = -torch.log(positive / (positive + mass)).mean()
    for denominator in ("other", "all"):  # with one positive they are the same
        got = clustered_infonce(
            x,
            query_clusters=ids,
            temperature=t,
            hardness=hardness,
            prior=prior,
            denominator=denominator,
            impl=impl,
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("denominator", ["all", "other", "decoupled"])
def test_only_the_other_view_is_positive(impl: str, denominator: str) -> None:
    x, clusters = normalize(torch.randn(20, 6, dtype=torch.float64), dim=1), torch.arange(20) // 4
    samples = torch.arange(20) // 2
    s = x @ x.T / 0.2
    other = samples[:, None] != samples
    if denominator != "all":
        other = clusters[:, None] != clusters
    mass = s.masked_fill(~other, -math.inf).logsumexp(1)
    positive = s[torch.arange(20), torch.arange(20) ^ 1]
    want = mass - positive if denominator == "decoupled" else -logsigmoid(positive - mass)
    got = clustered_infonce(
        x,
        query_clusters=clusters,
        query_samples=samples,
        temperature=0.2,
        denominator=denominator,
        reduction="none",
        impl=impl,
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_a_temperature_for_each_row(variant: dict[str, Any], impl: str) -> None:
    """Row by row it is the loss at the row's temperature, and so is its gradient."""
    x, ids = normalize(torch.randn(10, 5, dtype=torch.float64), dim=1), torch.arange(10) % 3
    temperatures = torch.linspace(0.2, 1.0, 10, dtype=torch.float64).requires_grad_()
    arguments = {"query_clusters": ids, "reduction": "none", "impl": impl, **variant}
    rows = clustered_infonce(x, temperature=temperatures, **arguments)
    (gradient,) = torch.autograd.grad(rows.sum(), temperatures)
    for i, value in enumerate(temperatures.detach().tolist()):
        t = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        row = clustered_infonce(x, temperature=t, **arguments)[i]
        torch.testing.assert_close(rows[i], row)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(row, t)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS[::5], ids=lambda v: "-".join(map(str, v.values())))
def test_compiles_without_a_graph_break(variant: dict[str, Any], impl: str) -> None:
    q, k = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    qc, kc = torch.randint(-1, 4, (20,)), torch.randint(-1, 4, (30,))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        q, k = normalize(q, dim=1), normalize(k, dim=1)
        return clustered_infonce(q, k, query_clusters=qc, key_clusters=kc, impl=impl, **variant)

    torch.compiler.reset()  # each variant is a program of its own
    want = loss(q, k)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k)))
