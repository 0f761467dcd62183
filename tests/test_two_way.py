"""Both directions' log-sum-exps against their definition, and PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_cases import MEETS, SHAPES, case, met, with_gradients
from torch import Tensor

from wscl_fast import _ops
from wscl_fast._ops import room
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.usefixtures("extension")


def definition(a: dict[str, Any], meets: str) -> tuple[Tensor, Tensor]:
    logits, mask = a["scale"] * (a["queries"] @ a["keys"].T), met(a, meets)

    def lse(dim: int) -> Tensor:
        some = mask.any(dim)
        hidden = ~mask & some.unsqueeze(dim)
        return logits.masked_fill(hidden, -torch.inf).logsumexp(dim).masked_fill(~some, -torch.inf)

    return lse(1), lse(0)


def upstream(a: dict[str, Any], meets: str) -> list[Tensor]:
    """A gradient for every row and column; NaN, which goes nowhere, for those that meet nothing."""
    mask = met(a, meets)
    return [
        torch.where(mask.any(dim), torch.arange(1.0, mask.shape[1 - dim] + 1, dtype=torch.float64), torch.nan)
        for dim in (1, 0)
    ]


@pytest.mark.parametrize("meets", MEETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 4, 20), (2300, 90, 130)])
@pytest.mark.parametrize("magnitude", [1.0, 60.0])  # one exponential a pair, or two
def test_definition(meets: str, dtype: torch.dtype, shape: tuple[int, int, int], magnitude: float) -> None:
    a = case(*shape)
    a["queries"] = a["queries"] * magnitude
    exact, exact_leaves = with_gradients(a)
    want = definition(exact, meets)
    above = upstream(a, meets)
    finite = [value > -torch.inf for value in want]
    total = sum((value * grad)[some].sum() for value, grad, some in zip(want, above, finite, strict=True))
    want_gradients = torch.autograd.grad(total, exact_leaves)

    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in a.items()}
    ours, leaves = with_gradients(cast)
    got = _ops.two_way_logsumexp(Pairs(**ours), meets)
    gradients = torch.autograd.grad(got, leaves, [grad.to(dtype) for grad in above])
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * magnitude} if dtype == torch.float32 else {}
    for value, right in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), right, **tolerance)
    for ours_, theirs in zip(gradients, want_gradients, strict=True):
        size = theirs.abs().max().item() if theirs.numel() else 1
        slack = (2e-5 if dtype == torch.float32 else 1e-12) * magnitude * (1 + size)
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=slack)


@pytest.mark.parametrize("leaf", ["queries", "keys", "scale"])
def test_one_gradient_alone(leaf: str) -> None:
    a = case(40, 30, 8)
    ours, leaves = with_gradients(a)
    want = dict(
        zip(
            ("queries", "keys", "scale"),
            torch.autograd.grad(_ops.two_way_logsumexp(Pairs(**ours)), leaves, upstream(a, "all")),
            strict=True,
        )
    )
    alone = {**a, leaf: a[leaf].clone().requires_grad_()}
    (got,) = torch.autograd.grad(_ops.two_way_logsumexp(Pairs(**alone)), [alone[leaf]], upstream(a, "all"))
    torch.testing.assert_close(got, want[leaf])


@pytest.mark.parametrize("side", [0, 1])
def test_one_direction_alone_is_the_plain_logsumexp(side: int) -> None:
    a = {**case(50, 70, 9), "own": None}
    ours, leaves = with_gradients(a)
    one = _ops.two_way_logsumexp(Pairs(**ours))[side]
    sides = {"queries": "keys", "keys": "queries", "query_ids": "key_ids", "key_ids": "query_ids"}
    swapped = {name: ours[sides.get(name, name)] if side else ours[name] for name in ours}
    other = _ops.logsumexp(Pairs(**swapped))
    torch.testing.assert_close(one, other)
    above = torch.where(one > -torch.inf, torch.randn_like(one), 0.0)
    for got, want in zip(*(torch.autograd.grad(x, leaves, above) for x in (one, other)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [32, 33])
def test_halves_are_exact_up_to_their_rounding(dtype: torch.dtype, d: int, extension) -> None:  # type: ignore[no-untyped-def]
    a = case(90, 200, d)
    a["queries"], a["keys"] = ((a[name] / d**0.5).to(dtype) for name in ("queries", "keys"))
    above = upstream(a, "all")
    exact, exact_leaves = with_gradients({**a, "queries": a["queries"].double(), "keys": a["keys"].double()})
    want = definition(exact, "all")
    finite = [value > -torch.inf for value in want]
    total = sum((value * grad)[some].sum() for value, grad, some in zip(want, above, finite, strict=True))
    want_gradients = torch.autograd.grad(total, exact_leaves)
    before = extension.instruction_set()
    try:
        for name in extension.supported_instruction_sets():
            extension.use_instruction_set(name)
            ours, leaves = with_gradients({**a, "scale": a["scale"].float()})
            got = _ops.two_way_logsumexp(Pairs(**ours))
            gradients = torch.autograd.grad(got, leaves, [grad.float() for grad in above])
            for value, right in zip(got, want, strict=True):
                torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
            for ours_, theirs in zip(gradients, want_gradients, strict=True):
                error = (ours_.double() - theirs).norm() / theirs.norm()
                assert error < (4e-3 if dtype == torch.bfloat16 else 5e-4), (name, error)
    finally:
        extension.use_instruction_set(before)


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    for value in (torch.nan, torch.inf):
        a = {**case(60, 90, 16), "own": None, "query_ids": None, "key_ids": None}
        a["keys"][7, 3] = value
        rows, columns = _ops.two_way_logsumexp(Pairs(**a))
        want_rows, want_columns = definition(a, "all")
        assert torch.equal(rows.isfinite(), want_rows.isfinite())
        assert torch.equal(columns.isfinite(), want_columns.isfinite())


@pytest.mark.parametrize("meets", MEETS)
def test_gradcheck(meets: str) -> None:
    a = {**case(6, 9, 4), "query_ids": torch.tensor([0, 0, 1, 2, 3, 1]), "own": None}
    a["key_ids"] = torch.tensor([0, 1, 1, 2, 2, 3, 0, 3, 3])
    ours, leaves = with_gradients(a)

    def both(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        vectors = {"queries": queries, "keys": keys, "scale": scale}
        return _ops.two_way_logsumexp(Pairs(**{**ours, **vectors}), meets)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("meets", [0, 1, 2])
def test_opcheck(meets: int) -> None:
    a = case(13, 17, 6, dtype=torch.float32)
    for arguments in (a, with_gradients(a)[0]):
        torch.library.opcheck(torch.ops.wscl_fast.two_way_logsumexp.default, (*arguments.values(), meets, -1))
    _, _, rows, columns = torch.ops.wscl_fast.two_way_logsumexp(*a.values(), meets, -1)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(
            torch.ops.wscl_fast.two_way_logsumexp_backward.default,
            (torch.randn(13), torch.randn(17), *a.values(), meets, -1, rows, columns, *needs),
        )


def test_opcheck_with_room() -> None:
    a = case(13, 17, 6, dtype=torch.float32)
    for arguments in (a, with_gradients(a)[0]):
        # Room for no logits: what stands in the rest of a larger one is nobody's business.
        given = (*arguments.values(), 0, -1, 0)
        torch.library.opcheck(torch.ops.wscl_fast.two_way_logsumexp_with_room.default, given)
    found = torch.ops.wscl_fast.two_way_logsumexp_with_room(*a.values(), 0, -1, 9000)
    torch.library.opcheck(
        torch.ops.wscl_fast.two_way_logsumexp_with_room_backward.default,
        (torch.randn(13), torch.randn(17), *a.values(), 0, -1, *found[2:]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(500, 900), (900, 500)])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_kept_logits_give_the_same_bits(
    dtype: torch.dtype, n: int, m: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = torch.randn(n, 24).to(dtype) / 5, torch.randn(m, 24).to(dtype) / 5
    above = [torch.randn(n).to(torch.promote_types(dtype, torch.float32)), None]
    above[1] = torch.randn(m).to(above[0].dtype)
    scale = torch.tensor(6.0, dtype=above[0].dtype)
    leaves = [x.requires_grad_() for x in (queries, keys, scale)]
    results = []
    for kept in (True, False):
        monkeypatch.setattr(room, "BYTES", int(share * n * m * above[0].element_size()) if kept else 0)
        lses = _ops.two_way_logsumexp(Pairs(queries, keys, None, None, None, scale))
        assert ("with_room" in lses[0].grad_fn.name()) == kept
        results.append((*lses, *torch.autograd.grad(lses, leaves, above)))
    for a, b in zip(*results, strict=True):
        assert a.equal(b)


def test_compiles_without_a_graph_break() -> None:
    _, leaves = with_gradients(case(10, 12, 6))

    def total(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        rows, columns = _ops.two_way_logsumexp(Pairs(queries, keys, None, None, None, scale))
        return rows.sum() + columns.sum()

    want = total(*leaves)
    got = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_the_same_bits_every_time_and_no_second_derivative() -> None:
    ours, leaves = with_gradients(case(300, 500, 24, dtype=torch.float32))
    above = [torch.ones(300), torch.ones(500)]
    first, second = (
        torch.autograd.grad(_ops.two_way_logsumexp(Pairs(**ours)), leaves, above, create_graph=True)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first[0].sum().backward()
