"""CLIP's and SigLIP's losses: by their formulas, with clusters, and by every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from wscl_fast import _ops
from wscl_fast.functional import clip_loss, siglip_loss

IMPLS = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def sides(n: int, m: int, d: int = 6, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    vectors = [normalize(torch.randn(rows, d, generator=g, dtype=torch.float64), dim=1) for rows in (n, m)]
    ids = [torch.randint(-1, 5, (rows,), generator=g) for rows in (n, m)]
    return vectors, dict(zip(("x_clusters", "y_clusters"), ids, strict=True))


def values(name: str, vectors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = [v.to(dtype, copy=True).requires_grad_() for v in vectors]
    leaves.append(torch.tensor(options.pop("temperature", 0.2), dtype=dtype, requires_grad=True))
    arguments = {"temperature": leaves[2]}
    if name == "siglip":
        leaves.append(torch.tensor(-3.0, dtype=dtype, requires_grad=True))
        arguments["bias"] = leaves[3]
    loss = LOSSES[name](*leaves[:2], **arguments, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_clip_is_the_mean_of_two_cross_entropies(impl: str) -> None:
    (x, y), _ = sides(20, 20)
    logits, ids = x @ y.T / 0.07, torch.arange(20)
    want = (cross_entropy(logits, ids) + cross_entropy(logits.T, ids)) / 2
    torch.testing.assert_close(clip_loss(x, y, impl=impl), want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_clip_shares_the_target_among_duplicates(impl: str) -> None:
    (x, y), _ = sides(12, 18)
    xc, yc = torch.arange(12) % 5, torch.arange(18) % 6
    logits, same = x @ y.T / 0.3, (xc[:, None] == yc).double()
    one = cross_entropy(logits, same / same.sum(1, keepdim=True))
    some = yc < 5  # the sixth cluster has no x
    two = cross_entropy(logits.T[some], (same / same.sum(0)).T[some])
    got = clip_loss(x, y, x_clusters=xc, y_clusters=yc, temperature=0.3, impl=impl)
    torch.testing.assert_close(got, (one + two) / 2)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("clusters", [False, True])
def test_siglip_by_its_formula(clusters: bool, impl: str) -> None:
    (x, y), ids = sides(12, 12)
    options: dict[str, Any] = {"temperature": 0.1, "bias": -5.0}
    same, met = torch.eye(12, dtype=torch.bool), torch.ones(12, 12, dtype=torch.bool)
    if clusters:
        options |= ids
        xc, yc = ids.values()
        same, met = xc[:, None] == yc, (xc != -1)[:, None] & (yc != -1)
    logits = x @ y.T / 0.1 - 5
    terms = -logsigmoid(torch.where(same, logits, -logits)).masked_fill(~met, 0)
    torch.testing.assert_close(siglip_loss(x, y, **options, impl=impl), terms.sum() / met.any(1).sum())
    rows = siglip_loss(x, y, **options, reduction="none", impl=impl)
    torch.testing.assert_close(rows, terms.sum(1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_float64_is_the_definition(name: str, impl: str) -> None:
    vectors, ids = sides(40, 70)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 2}):
        want = values(name, vectors, torch.float64, impl="reference", **ids, **options)
        got = values(name, vectors, torch.float64, impl=impl, **ids, **options)
        for here, there in zip(got, want, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)),
    n=st.integers(0, 60),
    m=st.integers(0, 90),
    d=st.integers(1, 40),
    temperature=st.floats(0.005, 10),
    seed=st.integers(0, 2**31),
)
def test_float32_is_as_exact_as_plain_pytorch(
    name: str, n: int, m: int, d: int, temperature: float, seed: int
) -> None:
    vectors, options = sides(n, m, d, seed)
    options["temperature"] = temperature
    exact = values(name, vectors, torch.float64, impl="reference", **options)
    plain = values(name, vectors, torch.float32, impl="reference", **options)
    for impl in IMPLS:
        for got, rival, want in zip(
            values(name, vectors, torch.float32, impl=impl, **options), plain, exact, strict=True
        ):
            error, rivals, size = (
                float(v.double().abs().max()) if v.numel() else 0.0 for v in (got - want, rival - want, want)
            )
            assert torch.isfinite(got).all()
            assert error <= rivals + 2e-6 * size + 1e-6 / temperature


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives(name: str, impl: str) -> None:
    vectors, ids = sides(6, 8, 3)
    vectors = [v.requires_grad_() for v in vectors]
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        bias = {} if name == "clip" else {"bias": -2 * t}
        return LOSSES[name](x, y, temperature=t, **bias, **ids, impl=impl)

    assert torch.autograd.gradcheck(loss, (*vectors, t))
    assert torch.autograd.gradgradcheck(loss, (*vectors, t))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_finite_input_gives_a_finite_result(name: str, impl: str) -> None:
    for ids in (torch.zeros(9).long(), torch.arange(9), torch.full((9,), -1)):
        for x in (torch.zeros(9, 4), torch.ones(9, 4), 100 * torch.randn(9, 4)):
            leaves = [x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()]
            loss = LOSSES[name](*leaves, x_clusters=ids, temperature=1.0, impl=impl)
            loss.backward()
            assert torch.isfinite(loss)
            assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
            if (ids == -1).all():
                assert loss == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(name: str, impl: str) -> None:
    vectors, ids = sides(12, 20)
    vectors = [v.requires_grad_() for v in vectors]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[name](x, y, impl=impl, **ids)

    torch.compiler.reset()
    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(*vectors), loss(*vectors)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, vectors), torch.autograd.grad(want, vectors))


@pytest.mark.parametrize("ignore_index", [0, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_no_row_without_ids_is_without_a_cluster(name: str, ignore_index: int) -> None:
    x, y = torch.randn(2, 4, 3)
    assert LOSSES[name](x, y, ignore_index=ignore_index) == LOSSES[name](x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_refusals(name: str) -> None:
    loss, x, ids = LOSSES[name], torch.randn(4, 3), torch.arange(4)
    for arguments, options, error, message in (
        (([1.0], x), {}, TypeError, "x: expected a tensor, got list"),
        ((x, torch.randn(4, 2)), {}, ValueError, "y: expected 3 columns as in x"),
        ((x, torch.randn(5, 3)), {}, ValueError, "y: expected 4 rows as in x where y_clusters is None"),
        ((x, x), {"y_clusters": ids}, ValueError, "y_clusters: expected None where x_clusters is None"),
        ((x, x), {"x_clusters": ids.float()}, TypeError, "x_clusters: expected int64"),
        ((x, x), {"x_clusters": ids[:3]}, ValueError, r"x_clusters: expected shape \(4,\)"),
        ((x, x), {"reduction": "median"}, ValueError, "reduction: expected one of"),
        ((x, x), {"temperature": -1}, ValueError, "temperature: expected a finite number above 0"),
    ):
        with pytest.raises(error, match=message):
            loss(*arguments, **options)
    with pytest.raises(TypeError, match="bias: expected a number or a tensor, got str"):
        siglip_loss(x, x, bias="low")
    with pytest.raises(TypeError, match="bias: expected a number or a floating-point 0-dim tensor"):
        siglip_loss(x, x, bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"y_weights: expected shape \(4,\)"):
        clip_loss(x, x, y_weights=torch.ones(3))
