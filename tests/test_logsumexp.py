"""The masked log-sum-exp against its definition: what is met, gradients, blocks, PyTorch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_cases import MEETS, SHAPES, case, met, with_gradients
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.usefixtures("extension")


def definition(a: dict[str, Any], meets: str) -> Tensor:
    logits = a["scale"] * (a["queries"] @ a["keys"].T)
    mask = met(a, meets)
    some = mask.any(1)
    lse = logits.masked_fill(~mask & some[:, None], -torch.inf).logsumexp(1)
    return lse.masked_fill(~some, -torch.inf)


@pytest.mark.parametrize("meets", MEETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(meets: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    a = case(*shape)
    exact, exact_leaves = with_gradients(a)
    want = definition(exact, meets)
    some = met(a, meets).any(1)
    upstream = torch.arange(1.0, len(want) + 1, dtype=torch.float64)
    want_gradients = torch.autograd.grad((want * upstream)[some].sum(), exact_leaves)

    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in a.items()}
    ours, leaves = with_gradients(cast)
    got = _ops.logsumexp(Pairs(**ours), meets)
    # A gradient of any value, NaN too, from above a row that meets nothing goes nowhere.
    above = torch.where(some, upstream, torch.nan).to(dtype)
    gradients = torch.autograd.grad(got, leaves, above)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(got.double(), want, **tolerance)
    for ours_, theirs in zip(gradients, want_gradients, strict=True):
        size = theirs.abs().max().item() if theirs.numel() else 1
        slack = {"rtol": 0, "atol": (2e-5 if dtype == torch.float32 else 1e-12) * (1 + size)}
        torch.testing.assert_close(ours_.double(), theirs, **slack)


@pytest.mark.parametrize("without", [("query_ids",), ("key_ids",), ("query_ids", "key_ids", "own")])
def test_ids_are_optional(without: tuple[str, ...]) -> None:
    a = {**case(9, 14, 5), **dict.fromkeys(without)}
    torch.testing.assert_close(_ops.logsumexp(Pairs(**a)), definition(a, "all"))


@pytest.mark.parametrize("meets", MEETS)
def test_few_clusters_skip_whole_blocks(meets: str) -> None:
    a = case(64, 4000, 16, clusters=2)
    torch.testing.assert_close(_ops.logsumexp(Pairs(**a), meets), definition(a, meets))


@pytest.mark.parametrize("meets", MEETS)
def test_gradcheck(meets: str) -> None:
    a = {**case(6, 9, 4), "query_ids": torch.tensor([0, 0, 1, 2, 3, 1])}
    a["key_ids"] = torch.tensor([0, 1, 1, 2, 2, -1, 0, 3, 3])
    ours, leaves = with_gradients(a)

    def lse(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        vectors = {"queries": queries, "keys": keys, "scale": scale}
        return _ops.logsumexp(Pairs(**{**ours, **vectors, "own": None}), meets)

    assert torch.autograd.gradcheck(lse, leaves)


@pytest.mark.parametrize("meets", [0, 1, 2])
def test_opcheck(meets: int) -> None:
    a = case(13, 17, 6, dtype=torch.float32)
    for gradient in (False, True):
        arguments = with_gradients(a)[0] if gradient else a
        torch.library.opcheck(
            torch.ops.wscl_fast.logsumexp.default, (*arguments.values(), meets, -1, gradient)
        )
    _, stats, _ = torch.ops.wscl_fast.logsumexp(*a.values(), meets, -1, False)
    torch.library.opcheck(
        torch.ops.wscl_fast.logsumexp_key_gradient.default,
        (torch.randn(13), *a.values(), meets, -1, stats),
    )


def test_blocks_merge_to_the_whole() -> None:
    a = case(20, 60, 8)
    ours, leaves = with_gradients(a)
    lse = _ops.logsumexp(Pairs(**ours), "other")
    upstream = torch.randn(20, dtype=torch.float64)
    upstream[lse == -torch.inf] = 0
    grad_queries, grad_keys, grad_scale = torch.autograd.grad(lse, leaves, upstream)

    cuts = (slice(0, 7), slice(7, 7), slice(7, 40), slice(40, 60))
    pieces = []
    for cut in cuts:
        own = torch.where((a["own"] >= cut.start) & (a["own"] < cut.stop), a["own"] - cut.start, -1)
        pieces.append({**a, "keys": a["keys"][cut], "key_ids": a["key_ids"][cut], "own": own})
    merged = _ops.logsumexp_block(Pairs(**pieces[0]), "other")
    for piece in pieces[1:]:
        merged = _ops.merge_blocks(merged, _ops.logsumexp_block(Pairs(**piece), "other"))
    torch.testing.assert_close(merged.lse(), lse.detach())
    torch.testing.assert_close(a["scale"] * upstream[:, None] * merged.mean, grad_queries)
    torch.testing.assert_close((upstream * (a["queries"] * merged.mean).sum(1)).sum(), grad_scale)
    by_block = [
        _ops.logsumexp_block_backward(upstream, Pairs(**piece), merged.stats, "other") for piece in pieces
    ]
    torch.testing.assert_close(torch.cat(by_block), grad_keys)


def test_compiles_without_a_graph_break() -> None:
    ours, leaves = with_gradients(case(10, 12, 6))
    options = {name: ours[name] for name in ("query_ids", "key_ids", "own")}

    def total(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        lse = _ops.logsumexp(Pairs(queries, keys, scale=scale, **options))
        return torch.where(lse > -torch.inf, lse, 0.0).sum()

    want = total(*leaves)
    got = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_wrong_direct_calls_are_refused() -> None:
    a = case(4, 5, 3)
    with pytest.raises(RuntimeError, match="'same' and 'other' need query_ids and key_ids"):
        _ops.logsumexp(Pairs(**{**a, "key_ids": None}), "same")
    with pytest.raises(RuntimeError, match="keys: expected 3 columns"):
        _ops.logsumexp(Pairs(**{**a, "keys": torch.zeros(5, 2, dtype=torch.float64)}))
