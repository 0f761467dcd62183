"""The masked sum of softplus against its definition, the sigmoid loss made of it, PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_cases import MEETS, SHAPES, case, met, with_gradients
from torch import Tensor
from torch.nn.functional import logsigmoid

from wscl_fast import _ops
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.usefixtures("extension")


def softplus_case(*shape: int, dtype: torch.dtype = torch.float64, sign: int = 1) -> dict[str, Any]:
    a = case(*shape, dtype=dtype)
    return {**a, "scale": sign * a["scale"], "offset": torch.linspace(-9, 3, shape[0], dtype=dtype)}


def softplus_sum(a: dict[str, Any], meets: str = "all") -> Tensor:
    pairs = {name: value for name, value in a.items() if name != "offset"}
    return _ops.softplus_sum(Pairs(**pairs), a["offset"], meets)


def leaves_of(a: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    ours, leaves = with_gradients(a)
    ours["offset"] = a["offset"].clone().requires_grad_()
    return ours, [*leaves, ours["offset"]]


def definition(a: dict[str, Any], meets: str) -> Tensor:
    t = a["scale"] * (a["queries"] @ a["keys"].T) + a["offset"][:, None]
    return -logsigmoid(-t).masked_fill(~met(a, meets), 0).sum(1)


@pytest.mark.parametrize("meets", MEETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_definition(meets: str, dtype: torch.dtype, shape: tuple[int, int, int], sign: int) -> None:
    a = softplus_case(*shape, sign=sign)
    exact, exact_leaves = leaves_of(a)
    want = definition(exact, meets)
    above = torch.arange(1.0, len(want) + 1, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * above).sum(), exact_leaves)

    ours, leaves = leaves_of({k: v.to(dtype) if v.is_floating_point() else v for k, v in a.items()})
    got = softplus_sum(ours, meets)
    gradients = torch.autograd.grad(got, leaves, above.to(dtype))
    exactness = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got.double(), want, rtol=10 * exactness, atol=1e-30)
    for ours_, theirs in zip(gradients, want_gradients, strict=True):
        size = theirs.abs().max().item() if theirs.numel() else 1
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=20 * exactness * (1 + size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_digit_is_lost_where_sums_are_small_or_logits_large(dtype: torch.dtype, extension) -> None:  # type: ignore[no-untyped-def]
    t = torch.tensor([-80.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 1e4, -1e4], dtype=dtype)
    want = -logsigmoid(-t.double())
    before = extension.instruction_set()
    try:
        for name in extension.supported_instruction_sets():
            extension.use_instruction_set(name)
            zero = torch.zeros(len(t), 1, dtype=dtype)
            got = _ops.softplus_sum(Pairs(zero, zero[:1], None, None, None, torch.ones((), dtype=dtype)), t)
            # The offset's rounding is relative to its own size.
            slack = torch.finfo(dtype).eps * (2 + t.abs().double() / 2) * want
            assert ((got.double() - want).abs() <= slack).all(), name
    finally:
        extension.use_instruction_set(before)


def test_the_sigmoid_loss_in_one_pass() -> None:
    """SigLIP: the pair's own label is +1, all others −1; −log σ(z t) = softplus(t) − [z = 1] t."""
    a = {**softplus_case(40, 40, 16), "query_ids": None, "key_ids": None, "own": None}
    a["offset"] = torch.full((40,), -3.0, dtype=torch.float64)
    t = a["scale"] * (a["queries"] @ a["keys"].T) - 3
    z = 2 * torch.eye(40, dtype=torch.float64) - 1
    want = -logsigmoid(z * t).sum(1)
    got = softplus_sum(a) - (a["scale"] * (a["queries"] * a["keys"]).sum(1) - 3)
    torch.testing.assert_close(got, want)
    got = softplus_sum({**a, "offset": torch.tensor(-3.0, dtype=torch.float64)})
    torch.testing.assert_close(got, softplus_sum(a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_exact_up_to_their_rounding(dtype: torch.dtype) -> None:
    a = softplus_case(90, 200, 33)
    a["queries"], a["keys"] = ((a[name] / 33**0.5).to(dtype) for name in ("queries", "keys"))
    exact, exact_leaves = leaves_of({**a, "queries": a["queries"].double(), "keys": a["keys"].double()})
    want = definition(exact, "all")
    ours, leaves = leaves_of({**a, "scale": a["scale"].float(), "offset": a["offset"].float()})
    got = softplus_sum(ours)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for ours_, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact_leaves), strict=True
    ):
        assert (ours_.double() - theirs).norm() < 4e-3 * theirs.norm()


@pytest.mark.parametrize("meets", MEETS)
def test_gradcheck(meets: str) -> None:
    ours, leaves = leaves_of(softplus_case(6, 9, 4))

    def total(queries: Tensor, keys: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        vectors = {"queries": queries, "keys": keys, "scale": scale, "offset": offset}
        return softplus_sum({**ours, **vectors}, meets)

    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("meets", [0, 1, 2])
def test_opcheck(meets: int) -> None:
    a = softplus_case(13, 17, 6, dtype=torch.float32)
    for gradient in (False, True):
        arguments = leaves_of(a)[0] if gradient else a
        torch.library.opcheck(
            torch.ops.wscl_fast.softplus_sum.default, (*arguments.values(), meets, -1, gradient)
        )
    torch.library.opcheck(
        torch.ops.wscl_fast.softplus_sum_key_gradient.default, (torch.randn(13), *a.values(), meets, -1)
    )


def test_compiles_without_a_graph_break() -> None:
    ours, leaves = leaves_of(softplus_case(10, 12, 6))
    ids = (ours["query_ids"], ours["key_ids"], ours["own"])

    def total(queries: Tensor, keys: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return _ops.softplus_sum(Pairs(queries, keys, *ids, scale), offset, "other").sum()

    want = total(*leaves)
    got = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_a_scale_of_either_sign_is_for_softplus_alone() -> None:
    a = softplus_case(4, 5, 3, sign=-1)
    assert softplus_sum(a).isfinite().all()
    del a["offset"]
    with pytest.raises(RuntimeError, match="scale: expected a number above 0"):
        _ops.logsumexp(Pairs(**a))
