"""``clustered_infonce``: every implementation against the definition in float64, and every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, problem, problems
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.functional import clustered_infonce

CASES = dict(problems())
NOT_BUILT = pytest.mark.skipif(_ops.extension is None, reason=f"no extension: {_ops.load_error}")
IMPLS = ["chunked", pytest.param("fused", marks=NOT_BUILT)]


def values(case: Problem, impl: str, dtype: torch.dtype) -> list[Tensor]:
    """Unreduced loss and all gradients under an uneven upstream gradient."""
    leaves, arguments = case.arguments(dtype)
    loss = clustered_infonce(**arguments, reduction="none", impl=impl)
    upstream = torch.linspace(0.5, 1.5, len(loss), dtype=dtype)
    gradients = torch.autograd.grad((loss * upstream).sum(), leaves)
    return [loss.detach(), *gradients]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_definition(name: str, impl: str) -> None:
    for got, want in zip(
        values(CASES[name], impl, torch.float64), values(CASES[name], "reference", torch.float64), strict=True
    ):
        assert torch.isfinite(got).all()
        logit = 100 / CASES[name].temperature.item() if "1e4" in name else 1 / CASES[name].temperature.item()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * max(logit, 1) ** 1.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_exact_as_plain_pytorch(name: str, impl: str) -> None:
    case = CASES[name]
    exact = values(case, "reference", torch.float64)
    # What one logit's rounding does, which plain PyTorch may escape by luck where there are only a few.
    largest = case.queries.norm(dim=-1).square().max().item() if len(case.queries) else 0
    rounding = 2e-6 * largest / case.temperature.item()
    for got, plain, want in zip(
        values(case, impl, torch.float32), values(case, "reference", torch.float32), exact, strict=True
    ):
        assert torch.isfinite(got).all()
        size = float(want.abs().max()) if want.numel() else 0.0
        assert difference(got, want) <= difference(plain, want) + 2e-6 * size + rounding


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    m=st.one_of(st.none(), st.integers(1, 300)),
    d=st.integers(1, 70),
    clusters=st.integers(1, 40),
    temperature=st.floats(0.02, 10),
    positives=st.sampled_from(["out", "in"]),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    n: int, m: int | None, d: int, clusters: int, temperature: float, positives: str, seed: int
) -> None:
    case = problem(n, m, d, clusters=clusters, temperature=temperature, positives=positives, seed=seed)
    impls = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])
    want = values(case, "reference", torch.float64)
    for impl in impls:
        for got, right in zip(values(case, impl, torch.float64), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-9)


def test_infonce_and_supcon_are_special_cases() -> None:
    """Sample ids give the cross-entropy of SimCLR's other view; labels give SupCon's L_out by its formula."""
    a, b = torch.nn.functional.normalize(torch.randn(2, 50, 16, dtype=torch.float64), dim=-1)
    ids = torch.arange(50)
    simclr = torch.nn.functional.cross_entropy(a @ b.T / 0.1, ids)
    torch.testing.assert_close(clustered_infonce(a, b, query_clusters=ids), simclr)

    x, labels = torch.cat([a, b]), torch.randint(0, 4, (100,))
    logits = (x @ x.T / 0.1).fill_diagonal_(-math.inf)
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~torch.eye(100, dtype=torch.bool)
    supcon = -(log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(clustered_infonce(x, query_clusters=labels), supcon)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_reductions_and_weights(impl: str) -> None:
    q, k = torch.randn(6, 4), torch.randn(9, 4)
    qc, kc = torch.tensor([0, 1, 7, -1, 1, 0]), torch.tensor([0, 1, 1, 0, 2, 2, -1, -1, 3])
    w = torch.tensor([1.0, 2.0, 5.0, 7.0, 0.5, 0.0])

    def loss(**options: object) -> Tensor:
        return clustered_infonce(q, k, query_clusters=qc, key_clusters=kc, impl=impl, **options)

    rows = loss(reduction="none")
    assert rows.shape == (6,)
    assert (rows[[2, 3]] == 0).all()  # no key of cluster 7; no cluster at all
    torch.testing.assert_close(loss(reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(), rows.sum() / 4)
    torch.testing.assert_close(loss(weights=w, reduction="none"), rows * w)
    torch.testing.assert_close(loss(weights=w), (rows * w).sum() / 3.5)
    torch.testing.assert_close(loss(weights=torch.zeros(6)), torch.tensor(0.0))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_keys_are_no_ones_negatives(impl: str) -> None:
    """Empty slots of a queue change nothing, whatever lies in them."""
    q, k = torch.randn(8, 5), torch.randn(20, 5)
    qc, kc = torch.randint(0, 3, (8,)), torch.randint(0, 3, (20,))
    kc[10:] = -1
    garbage = k.clone()
    garbage[10:] = 1e6
    whole = clustered_infonce(q, k[:10], query_clusters=qc, key_clusters=kc[:10], impl=impl)
    torch.testing.assert_close(
        clustered_infonce(q, garbage, query_clusters=qc, key_clusters=kc, impl=impl), whole
    )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_nothing_to_learn_from(impl: str, positives: str) -> None:
    for ids in (torch.full((5,), -1), torch.arange(5)):
        x = torch.randn(5, 3, requires_grad=True)
        loss = clustered_infonce(x, query_clusters=ids, impl=impl, positives=positives)
        loss.backward()
        assert loss.item() == 0
        assert (x.grad == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_partial_gradients_and_layouts(impl: str) -> None:
    q, k = torch.randn(16, 40, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64).T
    qc, kc = torch.randint(0, 3, (16,)), torch.randint(0, 3, (60,))[::2]
    strided = torch.randn(16, 80, dtype=torch.float64)[:, ::2]
    for x in (q, strided, q.expand(2, 16, 40)[1], q.flip(0)):
        want = None
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            a, b = (t.detach().requires_grad_(need) for t, need in zip((x, k), needs, strict=True))
            loss = clustered_infonce(a, b, query_clusters=qc, key_clusters=kc, impl=impl)
            gradients = [None, None]
            if any(needs):
                loss.backward()
                gradients = [a.grad, b.grad]
            want = want or [loss.detach(), *gradients]
            torch.testing.assert_close(loss.detach(), want[0])
            for need, got, right in zip(needs, gradients, want[1:], strict=True):
                assert (got is not None) == need
                if need:
                    torch.testing.assert_close(got, right)


def test_half_precision_is_computed_in_float32() -> None:
    x, ids = torch.randn(40, 16), torch.randint(0, 4, (40,))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype).requires_grad_()
        loss = clustered_infonce(half, query_clusters=ids)
        loss.backward()
        assert loss.dtype == torch.float32
        assert half.grad is not None
        assert half.grad.dtype == dtype
        torch.testing.assert_close(loss, clustered_infonce(x.to(dtype).float(), query_clusters=ids))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_autocast_does_not_touch_the_logits(impl: str) -> None:
    x, ids = torch.randn(40, 16, requires_grad=True), torch.randint(0, 4, (40,))
    outside = clustered_infonce(x, query_clusters=ids, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clustered_infonce(x, query_clusters=ids, impl=impl)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_vectors_of_no_numbers_meet_the_keys_all_the_same(impl: str) -> None:
    for keys in (2, 0):
        loss = clustered_infonce(
            torch.empty(4, 0),
            torch.empty(keys, 0),
            query_clusters=torch.zeros(4, dtype=torch.int64),
            key_clusters=torch.zeros(keys, dtype=torch.int64),
            impl=impl,
        )
        torch.testing.assert_close(loss, torch.tensor(math.log(keys) if keys else 0.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_rows_that_take_no_part_say_nothing(impl: str) -> None:
    x, ids = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, -1])
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    for reduction in ("mean", "sum", "none"):
        options = {"query_clusters": ids, "reduction": reduction, "impl": impl}
        want = clustered_infonce(x, weights=weights, **options)
        spoilt = torch.cat([weights[:4], torch.tensor([torch.nan, torch.inf])])
        assert clustered_infonce(x, weights=spoilt, **options).equal(want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("denominator", ["all", "other", "decoupled"])
@pytest.mark.parametrize("positives", ["out", "in"])
def test_an_own_key_beyond_the_keys_is_none(positives: str, denominator: str, impl: str) -> None:
    x, k = torch.randn(6, 4), torch.randn(5, 4)
    options = {
        "query_clusters": torch.zeros(6, dtype=torch.int64),
        "key_clusters": torch.arange(5) % 2,
        "positives": positives,
        "denominator": denominator,
    }
    own = torch.tensor([9, 4, -5, 0, 1, 5])
    want = clustered_infonce(x, k, exclude_self=own.where(own < 5, -1), impl="reference", **options)
    got = clustered_infonce(x, k, exclude_self=own, impl=impl, **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_prior_at_a_low_temperature(impl: str) -> None:
    """Logits whose exponentials float32 has not got."""
    x = torch.nn.functional.normalize(torch.randn(16, 4, dtype=torch.float64), dim=1)
    options = {"query_clusters": torch.arange(16) // 2, "temperature": 0.01, "prior": 0.1}
    want = clustered_infonce(x, impl="reference", **options)
    got = clustered_infonce(x.float(), impl=impl, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_numbers_of_numpy_are_numbers() -> None:
    x, ids = torch.randn(6, 4), torch.arange(6) // 2
    want = clustered_infonce(x, query_clusters=ids, ignore_index=1, exclude_self=True)
    for kind in (np.int64, np.int32):
        options = {"ignore_index": kind(1), "exclude_self": np.bool_(True), "return_stats": np.bool_(False)}
        assert clustered_infonce(x, query_clusters=ids, **options).equal(want)
    whole, real = (
        clustered_infonce(x, query_clusters=ids, hardness=hardness, impl="chunked")
        for hardness in (2**70, 2.0**70)
    )
    assert whole.equal(real)


def test_a_temperature_that_float64_has() -> None:
    x, ids = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) // 2
    want = clustered_infonce(x, query_clusters=ids, temperature=0.5)
    for temperature in (0.5e-100, torch.tensor(0.5e-100, dtype=torch.float64)):
        got = clustered_infonce(x * 1e-50, query_clusters=ids, temperature=temperature)
        torch.testing.assert_close(got, want)


GOOD = {"queries": torch.randn(4, 3), "query_clusters": torch.zeros(4, dtype=torch.int64)}
KEYS = {"keys": torch.randn(5, 3), "key_clusters": torch.zeros(5, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": [[0.0] * 3] * 4}, TypeError, "queries: expected a tensor, got list"),
        ({"queries": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "queries: expected a floating-point"),
        ({"queries": torch.randn(4)}, ValueError, r"queries: expected a matrix .* got shape \(4,\)"),
        ({"query_clusters": torch.zeros(4)}, TypeError, "query_clusters: expected int64, got torch.float32"),
        (
            {"query_clusters": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"query_clusters: expected shape \(4,\)",
        ),
        ({"query_clusters": [0, 0, 0, 0]}, TypeError, "query_clusters: expected a tensor, got list"),
        ({**KEYS, "keys": torch.randn(5, 2)}, ValueError, "keys: expected 3 columns"),
        ({**KEYS, "keys": torch.randn(5, 3, device="meta")}, ValueError, "keys: expected device cpu"),
        ({**KEYS, "key_clusters": None}, ValueError, "key_clusters: needed"),
        ({**KEYS, "keys": None}, ValueError, "key_clusters: expected None where keys is None"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: .* got nan"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: .* got -1.0"),
        ({"temperature": 1e-45}, ValueError, "temperature: expected at least 1.17.*e-38 in .* got 1e-45"),
        ({"temperature": torch.tensor(1e-45)}, ValueError, "temperature: expected at least 1.17.*e-38"),
        ({"temperature": 10**400}, ValueError, "temperature: .* that a float holds, got an int of 1329 bits"),
        ({"temperature": torch.ones(3)}, TypeError, r"temperature: .* got shape \(3,\)"),
        ({"temperature": torch.tensor([1, 1, 0.0, 1])}, ValueError, "temperature: .* got 0.0"),
        ({"denominator": "none"}, ValueError, "denominator: expected one of 'all', 'other', 'decoupled'"),
        ({"hardness": -1}, ValueError, "hardness: expected a number of at least 0 .* got -1"),
        ({"hardness": 1e300}, ValueError, r"hardness: expected .* below 3.4.*e\+38, got 1e\+300"),
        ({"hardness": 10**400}, ValueError, "hardness: expected a number that a float holds"),
        ({"hardness": "much"}, TypeError, "hardness: expected a number, got str"),
        ({"prior": 1.0}, ValueError, "prior: expected a number of at least 0 and below 1, got 1.0"),
        ({"query_samples": torch.zeros(4)}, TypeError, "query_samples: expected int64"),
        (
            {"key_samples": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            "key_samples: expected None where query_samples is None",
        ),
        ({**KEYS, "query_samples": torch.arange(4)}, ValueError, "key_samples: needed"),
        (
            {"query_samples": torch.arange(4), "key_samples": torch.arange(4)},
            ValueError,
            "key_samples: expected None where keys is None",
        ),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number .* got str"),
        ({"positives": "both"}, ValueError, "positives: expected one of 'out', 'in', got 'both'"),
        ({"reduction": "median"}, ValueError, "reduction: expected one of"),
        ({"impl": "fastest"}, ValueError, "impl: expected one of"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\)"),
        ({"weights": torch.tensor([1, 1, torch.nan, 1])}, ValueError, "weights: expected finite numbers"),
        ({"return_stats": torch.ones(3)}, TypeError, "return_stats: expected a bool, got Tensor"),
        ({"return_stats": 1}, TypeError, "return_stats: expected a bool, got int"),
        ({"query_clusters": torch.zeros(4).long().to_sparse()}, TypeError, "query_clusters: .* dense tensor"),
        (
            {"weights": torch.ones(4, dtype=torch.int64)},
            TypeError,
            "weights: expected a floating-point dtype",
        ),
        (
            {"queries": torch.zeros(4, 3).to(torch.float8_e4m3fn)},
            TypeError,
            "queries: expected float32, .* got",
        ),
        ({"ignore_index": 1 << 63}, ValueError, "ignore_index: expected an int of 64 bits, got 9223"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
        (
            {"exclude_self": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            "exclude_self: expected a bool where",
        ),
        (
            {**KEYS, "exclude_self": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"exclude_self: expected shape",
        ),
        ({**KEYS, "exclude_self": "yes"}, TypeError, "exclude_self: expected a bool or a tensor, got str"),
        (
            {
                "keys": torch.randn(2, 3),
                "key_clusters": torch.zeros(2, dtype=torch.int64),
                "exclude_self": True,
            },
            ValueError,
            "exclude_self: expected a key for each of the 4 queries, got 2 keys",
        ),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clustered_infonce(**{**GOOD, **change})
