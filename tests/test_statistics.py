"""``return_stats=True``: by every implementation, against the definitions, and without a pass of its own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from wscl_fast import ClusteredInfoNCE, _ops
from wscl_fast.functional import clustered_infonce

IMPLS = ["chunked"] + (["fused"] if _ops.serves(torch.device("cpu")) else [])
VARIANTS = [
    {"denominator": denominator, "positives": positives, **extra}
    for denominator, positives, extra in itertools.product(
        ("all", "other", "decoupled"), ("out", "in"), ({}, {"hardness": 0.5}, {"prior": 0.1})
    )
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_implementation_agrees(variant: dict[str, Any], impl: str) -> None:
    x, k = (normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (50, 70))
    ids, key_ids = torch.randint(-1, 6, (50,)), torch.randint(-1, 6, (70,))
    each = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    for keys, temperature, samples in itertools.product(
        ({}, {"keys": k, "key_clusters": key_ids}), (0.3, each), (False, True)
    ):
        arguments = {"query_clusters": ids, "temperature": temperature, **keys, **variant}
        if samples:
            of_sample = [torch.where(torch.arange(n) % 7 == 3, -1, torch.arange(n) // 2) for n in (50, 70)]
            arguments["query_samples"] = of_sample[0]
            arguments |= {"key_samples": of_sample[1]} if keys else {}
        want, wanted = clustered_infonce(x, **arguments, impl="reference", return_stats=True)
        got, stats = clustered_infonce(x, **arguments, impl=impl, return_stats=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got, clustered_infonce(x, **arguments))
        for name, here, there in zip(stats._fields, stats, wanted, strict=True):
            torch.testing.assert_close(here, there, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_definitions(impl: str) -> None:
    """Each in one line of plain PyTorch, of a batch where every query has positives and negatives."""
    x = normalize(torch.randn(24, 6, dtype=torch.float64), dim=1)
    ids = torch.arange(24) // 3
    _, stats = clustered_infonce(x, query_clusters=ids, temperature=0.25, impl=impl, return_stats=True)
    off = ~torch.eye(24, dtype=torch.bool)
    same = (ids[:, None] == ids) & off
    logits = (x @ x.T / 0.25).masked_fill(~off, -math.inf)
    distances = torch.cdist(x, x).square()
    p = logits.softmax(1)
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(1))
    torch.testing.assert_close(stats.positives, same.sum(1))
    assert stats.positive_share == 1
    torch.testing.assert_close(stats.positive_similarity, (x @ x.T)[same].mean())
    torch.testing.assert_close(stats.negative_similarity, (x @ x.T)[(ids[:, None] != ids)].mean())
    torch.testing.assert_close(stats.alignment, distances[same].mean())
    # At the temperature 1/4 it is Wang and Isola's uniformity with t = 2.
    torch.testing.assert_close(stats.uniformity, (-2 * distances[off]).exp().mean().log())
    torch.testing.assert_close(stats.entropy, -torch.special.xlogy(p, p).sum(1).mean())


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_nothing_to_tell(impl: str) -> None:
    x = torch.randn(4, 3)
    loss, stats = clustered_infonce(x, query_clusters=torch.full((4,), -1), impl=impl, return_stats=True)
    assert loss == 0
    assert stats.positive_share == 0
    assert (stats.positives == 0).all()
    assert (stats.logsumexp == -math.inf).all()
    assert stats.entropy.isnan()
    assert stats.alignment.isnan()


@pytest.mark.parametrize("keys", [False, True])
def test_no_other_pass_over_pairs(extension, keys: bool) -> None:  # type: ignore[no-untyped-def]
    """One operator over pairs forward, one for the keys' gradient; and the gradients are the loss's own."""
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function.namespace == "wscl_fast":
                calls.append(function._schema.name.split("::")[1])
            return function(*args, **(kwargs or {}))

    x, k = torch.randn(20, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    arguments: dict[str, Any] = {"query_clusters": torch.arange(20) % 3}
    if keys:
        arguments |= {"keys": k, "key_clusters": torch.arange(30) % 3}
    leaves = [x, k] if keys else [x]
    with Watch():
        loss, stats = clustered_infonce(x, **arguments, return_stats=True)
        gradients = torch.autograd.grad(loss, leaves)
    assert calls == ["logsumexp", "logsumexp_key_gradient"]
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in stats)
    want = torch.autograd.grad(clustered_infonce(x, **arguments), leaves)
    torch.testing.assert_close(gradients, want)


def test_the_module_returns_them() -> None:
    features, clusters = torch.randn(6, 2, 4), torch.tensor([0, 0, 1, 1, 2, -1])
    loss_fn = ClusteredInfoNCE(0.2)
    loss, stats = loss_fn(features, clusters, return_stats=True)
    torch.testing.assert_close(loss, loss_fn(features, clusters))
    assert stats.positives.tolist() == [3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 0, 0]
    torch.testing.assert_close(stats.positive_share, torch.tensor(10 / 12))
    for gathering in ("all", "ring", "count"):  # of one process
        _, shared = ClusteredInfoNCE(0.2, gather=gathering)(features, clusters, return_stats=True)
        torch.testing.assert_close(shared, stats, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl: str) -> None:
    ids = torch.arange(20) % 4

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = clustered_infonce(x, query_clusters=ids, impl=impl, return_stats=True)
        return loss, stats.entropy

    x = torch.randn(20, 8)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


@pytest.mark.parametrize("options", [{}, {"denominator": "other"}, {"hardness": 0.5, "own_views": True}])
@pytest.mark.parametrize("views", [2, 3])
def test_views_across(views: int, options: dict[str, Any]) -> None:
    """Of all views together; the same loss as without, and every number by its definition."""
    features, clusters = torch.randn(9, views, 5, dtype=torch.float64), torch.arange(9) // 3
    clusters[-1] = -1
    loss_fn = ClusteredInfoNCE(0.25, contrast="cross", **options)
    loss, stats = loss_fn(features, clusters, return_stats=True)
    torch.testing.assert_close(loss, loss_fn(features, clusters))
    x = normalize(features, dim=-1).flatten(0, 1)
    ids, samples = clusters.repeat_interleave(views), torch.arange(9).repeat_interleave(views)
    place = torch.arange(9 * views) % views
    met = (place[:, None] != place) & (ids[:, None] != -1) & (ids != -1)
    same = met & (ids[:, None] == ids)
    positive = met & (samples[:, None] == samples) if options.get("own_views") else same
    in_denominator = met & ~positive if options else met
    logits = (x @ x.T / 0.25).masked_fill(~in_denominator, -math.inf)
    p, distances = logits.softmax(1)[ids != -1], torch.cdist(x, x).square()

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return ((values * mask).sum(1) / mask.sum(1)).nanmean()

    torch.testing.assert_close(stats.positives, positive.sum(1))
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(1))
    torch.testing.assert_close(stats.positive_share.item(), 8 / 9)
    torch.testing.assert_close(stats.positive_similarity, mean(x @ x.T, positive))
    torch.testing.assert_close(stats.negative_similarity, mean(x @ x.T, met & ~positive))
    torch.testing.assert_close(stats.alignment, mean(distances, positive))
    torch.testing.assert_close(stats.uniformity, (-2 * distances[in_denominator]).exp().mean().log())
    torch.testing.assert_close(stats.entropy, -torch.special.xlogy(p, p).sum(1).mean())
