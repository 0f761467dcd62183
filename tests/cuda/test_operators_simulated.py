"""The CUDA bindings of the losses on simulated memory, against the CPU's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from described import Described
from simulated_operators import binding
from simulator import ptxsim
from torch import Tensor
from torch.nn.functional import normalize

pytestmark = pytest.mark.simulated


@pytest.fixture
def ops(extension: object) -> Iterator[Any]:
    """``torch.ops`` of the simulated bindings; a fault raises, and results that fakes describe otherwise."""
    bound = binding()
    ptxsim().reset()
    yield Described(torch.ops.wscl_fast_simulated)
    bound.wscl_forget_tensors()
    ptxsim().check()


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, ids of both, the queries' own keys."""
    queries, keys = (normalize(torch.randn(n, 24), dim=1).to(dtype) for n in (50, 70))
    return (
        queries,
        keys,
        torch.randint(-1, 4, (50,)),
        torch.randint(-1, 4, (70,)),
        torch.randint(-1, 70, (50,)),
    )


def same(got: Any, want: Any, dtype: torch.dtype) -> None:
    """The first results are alike; statistics and directions are each implementation's own."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def infonce(
    ops: Any,
    queries: Tensor,
    keys: Tensor | None,
    zq: Tensor,
    zk: Tensor | None,
    own: Tensor | None,
    inner: bool,
    tf32: bool = False,
) -> list[Tensor]:
    """Loss, count and all gradients."""
    scale, grad = torch.tensor(5.0), torch.linspace(-1, 1, len(queries))
    options = (scale, True, inner, -1)
    loss, count, stats, direction = ops.infonce_forward(queries, keys, zq, zk, own, *options, True, tf32)
    gradients = ops.infonce_backward(
        grad,
        queries,
        keys,
        zq,
        zk,
        own,
        *options,
        count,
        stats,
        direction,
        True,
        keys is not None,
        True,
        tf32,
    )
    return [loss, count, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
def test_infonce(ops: Any, dtype: torch.dtype, inner: bool) -> None:
    queries, keys, zq, zk, own = rows(dtype)
    for arguments in ((queries, keys, zq, zk, own), (queries, None, zq, None, None)):
        same(infonce(ops, *arguments, inner), infonce(torch.ops.wscl_fast, *arguments, inner), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_scale_alone(ops: Any, dtype: torch.dtype) -> None:
    queries, _, zq, *_ = rows(dtype)
    arguments = (queries, None, zq, None, None, torch.tensor(5.0), True, False, -1)
    grad, given = torch.linspace(-1, 1, len(queries)), []
    for which in (ops, torch.ops.wscl_fast):
        _, *saved = which.infonce_forward(*arguments, True)
        given.append(which.infonce_backward(grad, *arguments, *saved, False, False, True)[2])
    same(*([one] for one in given), dtype)


def pairs(
    ops: Any,
    arguments: tuple[Tensor, ...],
    by_row: Tensor,
    by_column: Tensor,
    offset: Tensor,
    meets: int,
    tf32: bool = False,
) -> dict[str, list[Tensor]]:
    """Of every operator over pairs: results and gradients."""
    scale, options = torch.tensor(5.0), (meets, -1)
    lse, stats, mean = ops.logsumexp(*arguments, scale, *options, True, tf32)
    grad_keys = ops.logsumexp_key_gradient(by_row, *arguments, scale, *options, stats, tf32)
    rows_, columns, *both = ops.two_way_logsumexp(*arguments, scale, *options, tf32)
    gradients = ops.two_way_logsumexp_backward(
        by_row, by_column, *arguments, scale, *options, *both, True, True, tf32
    )
    softplus = ops.softplus_sum(*arguments, scale, offset, *options, True, tf32)
    from_softplus = ops.softplus_sum_key_gradient(by_row, *arguments, scale, offset, *options, tf32)
    return {
        "logsumexp": [lse, mean, grad_keys],
        "two-way": [rows_, columns, *gradients],
        "softplus": [*softplus, from_softplus],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("meets", [0, 1, 2])
def test_pairs(ops: Any, dtype: torch.dtype, meets: int) -> None:
    arguments = rows(dtype), torch.rand(50), torch.rand(70), torch.randn(50), meets
    got, want = (pairs(which, *arguments) for which in (ops, torch.ops.wscl_fast))
    for name, results in got.items():
        same(results, want[name], dtype)


def test_tags(ops: Any) -> None:
    row_tags, column_tags = torch.randint(16, (50, 1)), torch.randint(16, (70, 1))
    values = torch.randn(70, 24)
    for jaccard in (False, True):
        results = [
            x.tag_weighted_sum(row_tags, column_tags, values, jaccard) for x in (ops, torch.ops.wscl_fast)
        ]
        same(*results, torch.float32)


def terms() -> set[int]:
    """Of the float32 passes since the reset."""
    names = [r["kernel"] for r in ptxsim().launches() if "FloatTiling<" in r["kernel"]]
    return {int(name.split("FloatTiling<")[1].removeprefix("(int)")[0]) for name in names}


def test_full_float32_unless_tf32_is_allowed(ops: Any) -> None:
    infonce(ops, *rows(torch.float32), False)
    pairs(ops, rows(torch.float32), torch.rand(50), torch.rand(70), torch.randn(50), 0)
    assert terms() == {3}


def test_where_tf32_is_allowed_every_pass_takes_two_terms(ops: Any) -> None:
    for keys in (True, False):
        queries, *others = rows(torch.float32)
        arguments = (queries, *others) if keys else (queries, None, others[1], None, None)
        got, want = (infonce(which, *arguments, True, True) for which in (ops, torch.ops.wscl_fast))
        assert terms() == {2}
        for one, other in zip(got, want, strict=True):  # TF32 itself would be off by 1e-3
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("meets", [0, 1, 2])
def test_pairs_take_two_terms_where_tf32_is_allowed(ops: Any, meets: int) -> None:
    # Levels of a hierarchy, tags' positives, SigLIP and two-way losses are made of these.
    arguments = rows(torch.float32), torch.rand(50), torch.rand(70), torch.randn(50), meets
    got, want = (pairs(which, *arguments, True) for which in (ops, torch.ops.wscl_fast))
    assert terms() == {2}
    for name, results in got.items():
        for one, other in zip(results, want[name], strict=True):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4, msg=name)


def test_bad_arguments(ops: Any) -> None:
    queries, keys, zq, zk, own = rows(torch.float32)
    for bad, message in (
        (lambda: infonce(ops, queries.double(), None, zq, None, None, False), "queries: expected float32"),
        (lambda: infonce(ops, queries, keys[:, 1:], zq, zk, own, False), "keys: expected 24 columns"),
        (
            lambda: infonce(ops, queries, keys.half(), zq, zk, own, False),
            "keys: expected the dtype of queries",
        ),
        (lambda: infonce(ops, queries, keys, zq, None, own, False), "keys and key_clusters go together"),
        (lambda: infonce(ops, queries, None, zq, None, own, False), "own: expected none"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
