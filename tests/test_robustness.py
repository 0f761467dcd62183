"""Every loss under what training does to it: extreme values, NaN, autocast, threads, transforms."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import FUSED, IMPLS, LOSSES, ROWWISE, problem, values
from torch import Tensor


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)),
    n=st.integers(1, 60),
    m=st.integers(1, 200),
    d=st.integers(1, 70),
    logit=st.sampled_from([1.0, 30.0, 1e3, 1e4]),
    temperature=st.floats(0.005, 10),
    seed=st.integers(0, 2**31),
)
def test_float32_is_as_exact_as_plain_pytorch(
    name: str, n: int, m: int, d: int, logit: float, temperature: float, seed: int
) -> None:
    """Rows of any length, logits up to 1e4: plain PyTorch's error, and 8 roundings of what is summed.

    A product of two rows is off by roundings of the absolute values that it sums up, in whatever order; that
    is the error of a logit, and of each probability, relative to itself. A gradient is a sum of rows by
    probabilities, which may cancel: there the rows' size counts, not the sum's.
    """
    case = problem(n, m, d, seed, magnitude=(logit * temperature) ** 0.5)
    options = {"temperature": temperature}
    exact = values(name, case, torch.float64, impl="reference", **options)
    plain = values(name, case, torch.float32, impl="reference", **options)
    q, k = case[0].abs(), case[1].abs()
    of_a_logit = 1 + float((q @ k.T).max()) / temperature
    terms = (1.0, float(k.max()) / temperature, 1.5 * float(q.sum(0).max()) / temperature)
    rounding = torch.finfo(torch.float32).eps
    for impl in (i for i in IMPLS if i != "reference"):
        for got, rival, want, term in zip(
            values(name, case, torch.float32, impl=impl, **options), plain, exact, terms, strict=True
        ):
            assert torch.isfinite(got).all()
            error, rivals, size = (float(v.double().abs().max()) for v in (got - want, rival - want, want))
            assert error <= rivals + 8 * rounding * (of_a_logit * term + size)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ROWWISE)
def test_nan_touches_its_rows_only(name: str, impl: str) -> None:
    q, k, qc, kc = problem(12, 20, 4, seed=3)
    qc, kc = qc.clamp(min=0), kc.clamp(min=0)
    kc[5] = -1
    options = {"reduction": "none", "temperature": 0.5, "impl": impl}
    clean = LOSSES[name](q, k, qc, kc, **options)
    for bad in (torch.nan, torch.inf):
        one = q.clone()
        one[4, 1] = bad
        rows = LOSSES[name](one, k, qc, kc, **options)
        others = torch.arange(12) != 4
        torch.testing.assert_close(rows[others], clean[others])
        assert not rows[4].isfinite()
        # A key that has an id is in every denominator (but "other" for its own cluster); one without is not.
        ignored = k.clone()
        ignored[5] = bad
        torch.testing.assert_close(LOSSES[name](q, ignored, qc, kc, **options), clean)
        # Without an id a row is nowhere in the gradients either. (A query of a soft loss always has one.)
        ids = torch.where(others | torch.tensor(name in ("jaccard", "cosine")), qc, -1)
        queries = q if ids.equal(qc) else one
        got, want = (
            values(name, (*vectors, ids, kc), torch.float64, temperature=0.5, impl=impl)
            for vectors in ((queries, ignored), (q, k))
        )
        for here, there in zip(got, want, strict=True):
            torch.testing.assert_close(here, there)
    poisoned = k.clone()
    poisoned[7] = torch.nan
    rows = LOSSES[name](q, poisoned, qc, kc, **options)
    assert rows[qc != kc[7]].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("denominator", ["all", "other", "decoupled", "soft"])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_nan_is_not_clamped_away(positives: str, denominator: str, impl: str) -> None:
    """A mass that is not known is neither the least that the prior leaves over nor that of no positive."""
    q, k, qc, kc = problem(12, 20, 4, seed=3)
    qc, kc = qc % 3, kc % 3
    name = "jaccard" if denominator == "soft" else "out"
    fixed = {} if denominator == "soft" else {"denominator": denominator, "prior": 0.1}
    options = {**fixed, "positives": positives, "impl": impl, "reduction": "none", "temperature": 0.5}
    clean = LOSSES[name](q, k, qc, kc, **options)
    one, poisoned = q.clone(), k.clone()
    one[4, 1] = poisoned[7, 1] = torch.nan
    rows = LOSSES[name](one, k, qc, kc, **options)
    others = torch.arange(12) != 4
    torch.testing.assert_close(rows[others], clean[others])
    assert rows[4].isnan()
    assert LOSSES[name](q, poisoned, qc, kc, **options).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_stay_finite(name: str, impl: str) -> None:
    """One cluster, all singletons, no positive, no id, zeros, duplicates, logits of ±1e4."""
    for ids in (torch.zeros(10), torch.arange(10), torch.full((10,), -1), torch.arange(10) // 5):
        for x in (torch.zeros(10, 4), torch.ones(10, 4), 100 * torch.randn(10, 4)):
            q, k = x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()
            ids = ids.long()
            loss = LOSSES[name](q, k, ids, ids.flip(0), temperature=1.0, impl=impl)
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(q.grad).all()
            assert torch.isfinite(k.grad).all()
    if name != "siglip":  # which needs no positive
        q, k = torch.randn(5, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        loss = LOSSES[name](q, k, torch.arange(0, 10, 2), torch.full((6,), -1), impl=impl)
        loss.backward()
        assert loss == 0
        assert (q.grad == 0).all()
        assert (k.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_beyond_exponents_agree(name: str, dtype: torch.dtype) -> None:
    """A maximum of 1e10 is rounded by hundreds: a product that is not must not meet it in an exponent."""
    far = 1e9 if dtype == torch.float64 else 1e5
    results = []
    for impl in IMPLS:
        torch.manual_seed(0)
        q, k = ((far * torch.randn(n, 32)).to(dtype).requires_grad_() for n in (64, 64))
        ids = torch.arange(64) // 4
        loss = LOSSES[name](q, k, ids, ids.flip(0), temperature=0.1, impl=impl)
        results.append((loss, *torch.autograd.grad(loss, [q, k])))
    for got in results[:-1]:
        for value, right in zip(got, results[-1], strict=True):
            assert torch.isfinite(value).all()
            torch.testing.assert_close(value, right, rtol=0.02, atol=0.02 * right.detach().abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_whose_squares_vanish_have_logits(name: str, dtype: torch.dtype) -> None:
    """A norm of 0 would bound by 0 what other rows and the temperature make hundreds of."""
    tiny, large, sharp = (1e-165, 1e150, 1e-17) if dtype == torch.float64 else (1e-25, 1e15, 1e-12)
    found = []
    for impl in IMPLS:
        torch.manual_seed(0)
        q = (tiny * torch.randn(64, 32, dtype=torch.float64)).to(dtype).requires_grad_()
        k = (large * torch.randn(64, 32, dtype=torch.float64)).to(dtype).requires_grad_()
        ids = torch.arange(64) // 4
        loss = LOSSES[name](q, k, ids, ids, temperature=sharp, impl=impl)
        found.append((loss, *torch.autograd.grad(loss, [q, k])))
    for got in found[:-1]:
        for value, right in zip(got, found[-1], strict=True):
            size = right.detach().abs().max().item()
            torch.testing.assert_close(value / size, right / size, rtol=0, atol=0.02)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_touch_the_logits(name: str, impl: str) -> None:
    q, k, qc, kc = problem(30, 40, 16, seed=0)
    q, k = q.float().requires_grad_(), k.float().requires_grad_()

    outside = LOSSES[name](q, k, qc, kc, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](q, k, qc, kc, impl=impl)
    assert inside.equal(outside)
    want = torch.autograd.grad(outside, [q, k])
    for got, right in zip(torch.autograd.grad(inside, [q, k]), want, strict=True):
        assert got.equal(right)


@pytest.mark.parametrize("impl", ["chunked", *FUSED])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(name: str, impl: str) -> None:
    """Of several sizes and temperatures: the later ones are traced as symbols."""
    torch._dynamo.reset()

    def loss(temperature: float, q: Tensor, k: Tensor, qc: Tensor, kc: Tensor) -> Tensor:
        return LOSSES[name](q, k, qc, kc, temperature=temperature, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows, temperature in ((6, 0.5), (9, 0.4)):
        case = problem(rows, rows + 2, 4, seed=0)
        results = []
        for function in (loss, compiled):
            q, k = (x.clone().requires_grad_() for x in case[:2])
            value = function(temperature, q, k, *case[2:])
            results.append([value.detach(), *torch.autograd.grad(value, [q, k])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_or_a_clear_error(name: str) -> None:
    case = problem(5, 7, 3, seed=1)
    q, k = (x.requires_grad_() for x in case[:2])

    def loss(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: LOSSES[name](q, k, *case[2:], temperature=0.8, impl=impl)

    for impl in ("chunked", "reference"):
        assert torch.autograd.gradgradcheck(loss(impl), (q, k))
    for impl in FUSED:
        assert torch.autograd.gradcheck(loss(impl), (q, k))
        gradients = torch.autograd.grad(loss(impl)(q, k), [q, k], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", ["queries", "temperature", "queries beside keys"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_penalty_without_one_of_the_keys(name: str, of: str, reduction: str) -> None:
    """Keys without a gradient, a queue's say, or with one that is not asked for: exact or refused as well."""
    q, k, *ids = problem(5, 7, 3, seed=1)
    temperature = torch.tensor(0.8, dtype=q.dtype, requires_grad=of == "temperature")
    leaf = temperature if of == "temperature" else q.requires_grad_()
    k.requires_grad_(of == "queries beside keys")

    def penalty(impl: str) -> Tensor:
        rows = LOSSES[name](q, k, *ids, temperature=temperature, reduction=reduction, impl=impl)
        (gradient,) = torch.autograd.grad(rows.sum(), leaf, create_graph=True)
        # The rest of a loss would hide that a penalty hangs on nothing.
        (found,) = torch.autograd.grad(gradient.square().sum() + leaf.sum(), leaf)
        return found

    torch.testing.assert_close(penalty("chunked"), penalty("reference"))
    for impl in FUSED:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            penalty(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_s_derivative_in_the_weights_of_rows(impl: str) -> None:
    """The gradient is linear in them, whoever computed it: what learns to weigh rows asks for this."""
    q, k, *ids = problem(5, 7, 3, seed=1)
    weights = torch.rand(5, dtype=q.dtype, requires_grad=True)
    q.requires_grad_()
    rows = LOSSES["other"](q, k, *ids, weights=weights, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(rows, q, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), weights)
    each = torch.autograd.functional.jacobian(
        lambda q: LOSSES["other"](q, k, *ids, reduction="none", impl="reference"), q.detach()
    )
    torch.testing.assert_close(found, 2 * (each * gradient.detach()).sum((1, 2)))


BY_IDS = ("out", "in", "other", "decoupled", "clip", "siglip")  # which read the ids as they were given


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*BY_IDS, "hierarchical"])
def test_what_stands_in_rows_without_an_id_leaves_the_temperature_alone(name: str, impl: str) -> None:
    q, k, qc, kc = problem(12, 20, 4, seed=3)
    qc[4] = kc[5] = -1
    each = torch.full((12,), 0.5, dtype=q.dtype)
    for start in (torch.tensor(0.5, dtype=q.dtype), *([] if name == "clip" else [each])):
        gradients = []
        for bad in (0.0, torch.nan, torch.inf):
            q[4] = k[5] = bad
            temperature = start.clone().requires_grad_()
            loss = LOSSES[name](q, k, qc, kc, temperature=temperature, impl=impl)
            gradients += torch.autograd.grad(loss, temperature)
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("impl", ["chunked", *FUSED])
@pytest.mark.parametrize("name", BY_IDS)
def test_ids_that_change_before_the_backward_pass_are_refused(name: str, impl: str) -> None:
    q, k, qc, kc = problem(6, 9, 3, seed=2)
    for ids in (qc, kc):
        loss = LOSSES[name](q.requires_grad_(), k, qc, kc, reduction="none", impl=impl).sum()
        ids.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_or_right(name: str) -> None:
    q, k, qc, kc = problem(6, 9, 3, seed=2)
    v = torch.ones_like(q)

    def tangent(impl: str) -> Tensor:
        return torch.func.jvp(lambda q: LOSSES[name](q, k, qc, kc, impl=impl), (q,), (v,))[1]

    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](leaf, k, qc, kc, impl="reference"), leaf)
    torch.testing.assert_close(tangent("reference"), gradient.sum())
    for impl in FUSED:
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|forward mode|jvp"):
            tangent(impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_vmap_is_refused(name: str, impl: str) -> None:
    q, k, qc, kc = problem(6, 6, 3, seed=2)
    batch = q.expand(3, 6, 3)
    for call in (
        lambda: torch.vmap(lambda x: LOSSES[name](x, k, qc, kc, impl=impl))(batch),
        lambda: torch.vmap(torch.func.grad(lambda x: LOSSES[name](x, k, qc, kc, impl=impl)))(batch),
        lambda: torch.vmap(lambda ids: LOSSES[name](q, k, ids, kc, impl=impl))(qc.expand(3, 6)),
        lambda: torch.vmap(lambda t: LOSSES[name](q, k, qc, kc, temperature=t, impl=impl))(torch.ones(3)),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.vmap is not supported"):
            call()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_every_time_and_from_every_thread(name: str, impl: str) -> None:
    q, k, qc, kc = problem(300, 700, 24, seed=0)

    def run() -> list[Tensor]:
        leaves = [q.float().requires_grad_(), k.float().requires_grad_()]
        loss = LOSSES[name](*leaves, qc, kc, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = run()
    for got, want in zip(run(), first, strict=True):
        assert got.equal(want)
    results: list[list[Tensor]] = []
    workers = [threading.Thread(target=lambda: results.append(run())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results:
        for got, want in zip(result, first, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # another thread may see another pool


@pytest.mark.parametrize("name", LOSSES)
def test_halves_are_computed_in_float32(name: str) -> None:
    case = problem(30, 40, 16, seed=0)
    for dtype in (torch.bfloat16, torch.float16):
        q, k = (x.to(dtype).requires_grad_() for x in case[:2])
        loss = LOSSES[name](q, k, *case[2:])
        loss.backward()
        assert loss.dtype == torch.float32
        assert q.grad.dtype == k.grad.dtype == dtype
        want = LOSSES[name](q.detach().double(), k.detach().double(), *case[2:], impl="reference")
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_of_the_definition(name: str) -> None:
    """PyTorch's function transforms do not take operators with their own gradients, nor checkpoints."""
    q, k, qc, kc = problem(12, 20, 4, seed=0)

    def loss(x: Tensor, impl: str = "reference") -> Tensor:
        return LOSSES[name](x, k, qc, kc, impl=impl)

    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), want)
    for impl in IMPLS:
        if impl != "reference":
            with pytest.raises(NotImplementedError, match=f"impl: expected 'reference' .*, got '{impl}'"):
                torch.func.grad(loss)(q, impl)


def own_not_finite(bad: float) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """The own key of queries 4, whose cluster it has, and 7 has a number that is not finite."""
    q, k, qc, kc = problem(12, 20, 4, seed=3)
    own = torch.arange(12) + 3
    own[7], qc[4], kc[7], k[7, 2] = 7, 2, 2, bad
    return (q, k, qc, kc), {"exclude_self": own, "temperature": 0.5}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in ROWWISE if name != "siglip"])
def test_an_own_key_that_is_not_finite_is_not_met(name: str, impl: str, bad: float) -> None:
    """The queries whose own key it is have the loss that they have with any other key there."""
    (q, k, qc, kc), options = own_not_finite(bad)
    rows = LOSSES[name](q, k, qc, kc, reduction="none", impl=impl, **options)
    other = k.clone()
    other[7] = 1
    clean = LOSSES[name](q, other, qc, kc, reduction="none", impl=impl, **options)
    apart = torch.zeros(12, dtype=torch.bool)
    apart[[4, 7]] = True
    torch.testing.assert_close(rows[apart], clean[apart])
    # All others meet it, if they take part at all. (A logit of −∞ leaves a row of another cluster as it is.)
    want = LOSSES[name](q, k, qc, kc, reduction="none", impl="reference", **options)
    assert rows.isfinite().equal(want.isfinite())
    assert rows[~apart & (clean != 0)].isnan().all() or bad == torch.inf
