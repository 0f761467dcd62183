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

from wscl_fast._ops import infonce as infonce_operators
from wscl_fast.functional import clustered_infonce

pytestmark = pytest.mark.simulated


@pytest.fixture
def ops(extension: object) -> Iterator[Any]:
    """``torch.ops`` of the simulated bindings; a fault raises, and results that fakes describe otherwise."""
    bound = binding()
    ptxsim().reset()
    yield Described(torch.ops.wscl_fast_simulated)
    bound.wscl_forget_tensors()
    ptxsim().check()


def rows(dtype: torch.dtype, d: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, ids of both, the queries' own keys."""
    queries, keys = (normalize(torch.randn(n, d), dim=1).to(dtype) for n in (50, 70))
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


@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
def test_large_logits_of_rows_that_stream(ops: Any, inner: bool) -> None:
    """Queries that are keys, of norm 2e4 at a scale of 5."""
    _, keys, zq, zk, own = rows(torch.float32, 300)
    queries = 2e4 * keys[:50]
    for arguments in ((queries, keys, zq, zk, own), (queries, None, zq, None, None)):
        # But for the scale's gradient, a small difference of large numbers.
        made = [infonce(which, *arguments, inner)[:4] for which in (ops, torch.ops.wscl_fast)]
        for one, other in zip(*made, strict=True):
            largest = other.abs().max() if other.numel() else 1
            same([one / largest], [other / largest], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_scale_alone(ops: Any, dtype: torch.dtype) -> None:
    queries, _, zq, *_ = rows(dtype)
    arguments = (queries, None, zq, None, None, torch.tensor(5.0), True, False, -1)
    grad, given = torch.linspace(-1, 1, len(queries)), []
    for which in (ops, torch.ops.wscl_fast):
        _, *saved = which.infonce_forward(*arguments, True)
        given.append(which.infonce_backward(grad, *arguments, *saved, False, False, True)[2])
    same(*([one] for one in given), dtype)


def reduced(
    ops: Any, arguments: tuple[Tensor | None, ...], scale: Tensor | None, inner: bool, mean: bool
) -> list[Tensor]:
    """Loss, count and the gradients of queries, keys and scale, by the operators of a GPU."""
    keys = arguments[1] is not None
    options = scale, 5.0 if scale is None else 0.0, not keys, inner, -1
    loss, count, direction, kept = ops.infonce_reduced_forward(*arguments, *options, mean, True, False)
    need = True, keys, scale is not None
    gradients = ops.infonce_reduced_backward(
        torch.tensor(1.0), *arguments, *options, direction, kept, *need, False
    )
    return [loss, count, *(grad for grad, needed in zip(gradients, need, strict=True) if needed)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_reduced(ops: Any, dtype: torch.dtype, inner: bool, mean: bool) -> None:
    """Against the CPU's rows, reduced by PyTorch."""
    queries, keys, zq, zk, own = rows(dtype)
    for arguments in ((queries, keys, zq, zk, own), (queries, None, zq, None, None)):
        plain = torch.ops.wscl_fast
        options = torch.tensor(5.0), arguments[1] is None, inner, -1
        loss, count, stats, direction = plain.infonce_forward(*arguments, *options, True)
        share = 1 / (count > 0).sum() if mean else torch.tensor(1.0)
        made = plain.infonce_backward(
            share.expand(50), *arguments, *options, count, stats, direction, True, keys is not None, True
        )
        wanted = [loss.sum() * share, count, made[0], *([made[1]] if arguments[1] is not None else [])]
        for scale in (torch.tensor(5.0), None):
            got = reduced(ops, arguments, scale, inner, mean)
            same(got, [*wanted, *([] if scale is None else [made[2]])], dtype)


@pytest.fixture
def as_if_on_a_gpu(ops: Any) -> Iterator[None]:
    """Operators that a GPU alone has take CPU tensors too."""
    library = torch.library.Library("wscl_fast", "IMPL")
    torch.use_deterministic_algorithms(True)  # which fills what lies between the parts of what is kept
    for name in ("infonce_reduced_forward", "infonce_reduced_backward"):
        library.impl(name, getattr(torch.ops.wscl_fast_simulated, name).default, "CPU")
    yield
    torch.use_deterministic_algorithms(False)
    library._destroy()


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("inner", [False, True], ids=["out", "in"])
def test_opcheck_of_a_reduced_loss(inner: bool) -> None:
    queries, keys, zq, zk, own = rows(torch.float32)
    for scale in (torch.tensor(5.0), None):
        for keys_ in (keys, None):
            tensors = (queries, None, zq, None, None) if keys_ is None else (queries, keys, zq, zk, own)
            tensors = tuple(
                x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in tensors
            )
            scale_ = None if scale is None else scale.clone().requires_grad_()
            options = scale_, 5.0, keys_ is None, inner, -1, True, True, False
            torch.library.opcheck(torch.ops.wscl_fast.infonce_reduced_forward.default, (*tensors, *options))


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_gradients_of_a_reduced_loss_through_autograd() -> None:
    queries, keys, zq, zk, _ = rows(torch.float32)
    for which in ((0, 1), (0,), (1,)):
        x, y = queries.clone(), keys.clone()
        leaves = [(x, y)[i].requires_grad_() for i in which]
        loss, _, *_ = infonce_operators._reduced_forward_op(
            x, y, zq, zk, None, None, 5.0, False, False, -1, True, x.requires_grad, False
        )
        got = torch.autograd.grad(3 * loss, leaves, create_graph=True)
        want = torch.autograd.grad(3 * reference_loss(x, y, zq, zk), leaves)
        same([x.detach() for x in got], want, torch.float32)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            got[0].sum().backward()


def test_more_ids_than_one_launch_sorts(ops: Any) -> None:
    """Torch sorts those, and the core takes them over."""
    keys, zk = normalize(torch.randn(66_000, 8), dim=1), torch.randint(-1, 3, (66_000,))
    queries, zq = keys[:3].flip(0), torch.tensor([0, 2, -1])
    got = reduced(ops, (queries, keys, zq, zk, None), None, False, True)
    x, y = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = reference_loss(x, y, zq, zk)
    same(
        got, [loss, (zq[:, None] == zk).sum(1) * (zq >= 0), *torch.autograd.grad(loss, (x, y))], torch.float32
    )


def reference_loss(queries: Tensor, keys: Tensor, zq: Tensor, zk: Tensor) -> Tensor:
    return clustered_infonce(
        queries.double(), keys.double(), query_clusters=zq, key_clusters=zk, temperature=0.2, impl="reference"
    ).float()


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
        (
            lambda: reduced(ops, (queries.double(), None, zq, None, None), None, False, True),
            "expected float32",
        ),
        (lambda: reduced(ops, (queries, keys, zq, None, own), None, False, True), "key_clusters go together"),
        (
            lambda: reduced(ops, (queries, None, zq, None, None), torch.zeros(2), False, True),
            "scale: expected a 0-dim float32 tensor",
        ),
        (
            lambda: ops.infonce_reduced_forward(
                queries, None, zq, None, None, None, 0.0, True, False, -1, True, True, False
            ),
            "constant_scale: expected a number above 0, got 0",
        ),
        (
            lambda: ops.infonce_reduced_backward(
                torch.tensor(1.0),
                queries,
                None,
                zq,
                None,
                None,
                None,
                5.0,
                True,
                False,
                -1,
                queries[:0],
                torch.zeros(3, dtype=torch.uint8),
                True,
                False,
                False,
                False,
            ),
            "kept: expected a vector of length",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
