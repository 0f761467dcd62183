"""Several levels of clusters at once: as the losses of the levels, and the constraint between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from wscl_fast import _ops
from wscl_fast.functional import clustered_infonce, hierarchical_infonce, soft_infonce

IMPLS = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])


def paths(rows: int, generator: torch.Generator, ignored: bool = True) -> Tensor:
    """Ids of three levels, each level's clusters within one of the level above."""
    leaves = torch.randint(0, 12, (rows,), generator=generator)
    ids = torch.stack([leaves // 6, leaves // 3, leaves], 1)
    if ignored:
        ids[torch.rand(rows, 3, generator=generator) < 0.15] = -1
    return ids


def problem(n: int, m: int | None, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(n, 6, generator=g, dtype=torch.float64).requires_grad_()]
    ids: dict[str, Any] = {"query_clusters": paths(n, g)}
    if m is not None:
        leaves.append(torch.randn(m, 6, generator=g, dtype=torch.float64).requires_grad_())
        ids["key_clusters"] = paths(m, g)
    return leaves, ids


def assert_same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    upstream = torch.rand(want.shape, dtype=want.dtype)
    mine, theirs = (torch.autograd.grad((x * upstream).sum(), leaves) for x in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("m", [None, 50])
def test_the_sum_of_the_levels(m: int | None, positives: str, impl: str) -> None:
    g = torch.Generator().manual_seed(0)
    leaves, _ = problem(40, m)
    ids = {"query_clusters": paths(40, g, ignored=False)}
    if m is not None:
        ids["key_clusters"] = paths(m, g, ignored=False)
    options = {"positives": positives, "weights": torch.rand(40, dtype=torch.float64), "temperature": 0.4}

    def column(level: int) -> dict[str, Tensor]:
        return {name: value[:, level] for name, value in ids.items()}

    for reduction in ("mean", "sum"):
        want = sum(
            w
            * clustered_infonce(
                *leaves, **{k: v[:, i] for k, v in ids.items()}, **options, reduction=reduction
            )
            for i, w in enumerate((0.5, 1.0, 2.0))
        )
        got = hierarchical_infonce(
            *leaves, **ids, **options, level_weights=[0.5, 1, 2], reduction=reduction, impl=impl
        )
        assert_same(got, want, leaves)
    rows = hierarchical_infonce(*leaves, **ids, **options, level_weights=[0.5, 1, 2], reduction="none")
    assert rows.shape == (40, 3)
    torch.testing.assert_close(rows.sum(), got)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("constraint", ["none", "level", "pair"])
@pytest.mark.parametrize("m", [None, 50])
def test_float64_is_the_definition(m: int | None, constraint: str, impl: str) -> None:
    leaves, ids = problem(40, m)
    for options in (
        {"exclude_self": False},
        {"temperature": torch.linspace(0.2, 2, 40, dtype=torch.float64)},
        {"ignore_index": 0},
        {"reduction": "none"},
        {"positives": "in"},
    ):
        if (constraint, options) in (("level", {"reduction": "none"}), ("pair", {"positives": "in"})):
            continue
        got, want = (
            hierarchical_infonce(*leaves, **ids, constraint=constraint, impl=i, **options)
            for i in (impl, "reference")
        )
        assert_same(got, want, leaves)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 30),
    m=st.one_of(st.none(), st.integers(0, 40)),
    constraint=st.sampled_from(["none", "level", "pair"]),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(n: int, m: int | None, constraint: str, seed: int) -> None:
    leaves, ids = problem(n, m, seed)
    for impl in IMPLS:
        got, want = (
            hierarchical_infonce(*leaves, **ids, constraint=constraint, impl=i) for i in (impl, "reference")
        )
        assert torch.isfinite(got)
        assert_same(got, want, leaves)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("loss", [hierarchical_infonce, soft_infonce])
def test_a_logit_of_minus_infinity_in_the_batch(loss: Any, impl: str) -> None:
    """The sample that it is of is no one's positive: the others' losses are as without it."""
    x, ids = torch.rand(20, 5) + 0.1, torch.arange(20) % 3
    x[7], ids[7] = -torch.inf, 9
    others = torch.arange(20) != 7

    def rows(some: Tensor) -> Tensor:
        if loss is soft_infonce:
            options: dict[str, Any] = {"query_auxiliary": 1 << ids[some], "affinity": "shared"}
        else:
            options = {"query_clusters": torch.stack([ids[some] // 2, ids[some]], 1)}
        return loss(x[some], positives="in", reduction="none", impl=impl, **options)  # type: ignore[no-any-return]

    torch.testing.assert_close(rows(others | True)[others], rows(others))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_constraints_by_their_formulas(impl: str) -> None:
    x = normalize(torch.randn(24, 5, dtype=torch.float64), dim=1)
    leaf = torch.arange(24) // 2
    ids = torch.stack([leaf // 4, leaf // 2, leaf], 1)
    levels = [clustered_infonce(x, query_clusters=column) for column in ids.T]
    got = hierarchical_infonce(x, query_clusters=ids, level_weights=[1, 1, 1], constraint="level", impl=impl)
    fine = levels[2]
    middle = torch.maximum(levels[1], fine)
    torch.testing.assert_close(got, fine + middle + torch.maximum(levels[0], middle))

    logits = (x @ x.T / 0.1).fill_diagonal_(-torch.inf)
    pair = logits.logsumexp(1, keepdim=True) - logits
    worst, total = -torch.inf, 0.0
    for column in ids.T.flip(0):
        positive = (column[:, None] == column).fill_diagonal_(False)
        raised = pair.clamp(min=worst)
        total = total + (raised.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
        worst = raised[positive].max().item()
    got = hierarchical_infonce(x, query_clusters=ids, level_weights=[1, 1, 1], constraint="pair", impl=impl)
    torch.testing.assert_close(got, total)


def test_one_pass_for_all_levels(extension) -> None:  # type: ignore[no-untyped-def]
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function.namespace == "wscl_fast":
                calls.append(function._schema.name.split("::")[1])
            return function(*args, **(kwargs or {}))

    leaves, ids = problem(40, 50)
    with Watch():
        torch.autograd.grad(hierarchical_infonce(*leaves, **ids), leaves)
    assert calls == ["logsumexp", "logsumexp_key_gradient"]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("constraint", ["none", "level", "pair"])
def test_derivatives(impl: str, constraint: str) -> None:
    leaves, ids = problem(6, 9)

    def loss(*x: Tensor) -> Tensor:
        return hierarchical_infonce(*x, **ids, temperature=0.7, constraint=constraint, impl=impl)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("constraint", ["none", "pair"])
def test_compiles_without_a_graph_break(impl: str, constraint: str) -> None:
    leaves, ids = problem(20, 30)

    def loss(*x: Tensor) -> Tensor:
        return hierarchical_infonce(*x, **ids, constraint=constraint, impl=impl)

    torch.compiler.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert_same(got, loss(*leaves), leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query_clusters": torch.zeros(4, 2)}, TypeError, "query_clusters: expected int64"),
        ({"query_clusters": [[0]]}, TypeError, "query_clusters: expected a tensor, got list"),
        (
            {"query_clusters": torch.arange(4)},
            ValueError,
            "query_clusters: expected a matrix",
        ),
        (
            {"keys": torch.randn(4, 3), "key_clusters": torch.zeros(4, 3, dtype=torch.int64)},
            ValueError,
            "key_clusters: expected 2 levels as in query_clusters, got 3",
        ),
        ({"level_weights": [1.0]}, ValueError, "level_weights: expected 2 numbers, one a level, got 1"),
        ({"level_weights": [1.0, -1.0]}, ValueError, "level_weights: expected a number of at least 0"),
        (
            {"level_weights": torch.tensor([1.0, torch.nan])},
            ValueError,
            "level_weights: expected a number of at least 0 .* got nan",
        ),
        ({"constraint": "some"}, ValueError, "constraint: expected one of 'none', 'level', 'pair'"),
        ({"constraint": "level", "reduction": "none"}, ValueError, "constraint: 'level'"),
        ({"constraint": "pair", "positives": "in"}, ValueError, "constraint: 'pair'"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\)"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"queries": torch.randn(4, 3), "query_clusters": torch.zeros(4, 2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        hierarchical_infonce(**{**good, **change})
