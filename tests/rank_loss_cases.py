"""Every option of every loss over ranks, as one process with the batch has it: value and gradients.

``tests/test_distributed.py`` reports it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import close, cut, longest_with_width
from torch import Tensor

from wscl_fast import distributed, functional
from wscl_fast.distributed import sum_over_ranks, world_size

CASES = {}
WAYS = ("all", "ring")
IMPLS = ("auto", "chunked")


def case(function):  # type: ignore[no-untyped-def]
    CASES[function.__name__] = function
    return function


Columns = Callable[[int], dict[str, Tensor]]  # what is known of so many rows


class Split:
    """A problem of one process, and the part of it that a rank has; the last rank but one has no query."""

    def __init__(self, group: Any, columns: Columns, *, explicit: bool) -> None:
        self.group, size = group, world_size(group)
        of_keys = {2: [11, 0], 3: [0, 12, 6], 4: [11, 0, 6, 9]}[size]
        self.rows = {"query": [[9, 0], [7, 0, 8], [6, 7, 0, 5]][size - 2], "key": of_keys}
        self.whole: dict[str, Tensor] = {}
        for side, name in (("query", "queries"), ("key", "keys"))[: 1 + explicit]:
            n = sum(self.rows[side])
            self.whole[name] = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
            for column, value in columns(n).items():
                if not column.startswith("key"):
                    self.whole[f"{side}_{column}"] = value
                elif side == "key":
                    self.whole[column] = value
        n = sum(self.rows["query"])
        self.whole["weights"] = torch.rand(n, dtype=torch.float64, requires_grad=True)
        self.mine = {name: self.part(name, value) for name, value in self.whole.items()}
        for arguments in (self.whole, self.mine):
            arguments["temperature"] = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def part(self, name: str, value: Tensor) -> Tensor:
        """The rows of this rank."""
        return cut(value, self.rows["key" if name.startswith("key") else "query"], self.group)

    def check(self, loss: str, gathering: str, impl: str, **options: Any) -> None:
        """Value and every gradient, to 1e-6 of the largest."""
        names = [name for name, value in self.whole.items() if value.requires_grad]
        want = getattr(functional, loss)(**self.whole, **options)
        over_ranks = {"impl": impl, "gather": gathering, "group": self.group}
        got = getattr(distributed, loss)(**self.mine, **options, **over_ranks)
        wanted = torch.autograd.grad(want, [self.whole[name] for name in names])
        gradients = list(torch.autograd.grad(got, [self.mine[name] for name in names]))
        gradients[-1] = sum_over_ranks(gradients[-1], self.group)  # of the temperature, which all ranks have
        close(got.detach(), want.detach())
        for name, here, there in zip(names, gradients, wanted, strict=True):
            if name == "weights":  # under a mean what is left of two losses: their size is what counts
                here, there = here + want.detach(), there + want.detach()
            close(here, self.part(name, there) if there.ndim else there)


def float32(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in arguments.items()}


def clusters(rows: int) -> dict[str, Tensor]:
    return {"clusters": torch.randint(-1, 3, (rows,))}


def samples(rows: int) -> dict[str, Tensor]:
    return {**clusters(rows), "samples": torch.randint(-1, 8, (rows,))}


def levels(rows: int) -> dict[str, Tensor]:
    leaves = torch.randint(0, 6, (rows, 1))
    ids = torch.cat([leaves // 4, leaves // 2, leaves], 1)
    return {"clusters": ids.masked_fill(torch.rand(rows, 3) < 0.15, -1)}


def tags(rows: int) -> dict[str, Tensor]:
    masks = torch.randint(0, 64, (rows, 2)) & torch.randint(0, 64, (rows, 2))
    return {"auxiliary": masks, "key_valid": torch.rand(rows) < 0.8}


def vectors(rows: int) -> dict[str, Tensor]:
    return {"auxiliary": torch.randn(rows, 3), "key_valid": torch.rand(rows) < 0.8}


def every_way(group: Any, loss: str, columns: Columns, *options: dict[str, Any]) -> None:
    """Each way of gathering, implementation and reduction; in the batch and against keys."""
    for gathering, impl, explicit, chosen in itertools.product(WAYS, IMPLS, (False, True), options):
        for reduction in ("mean", "sum"):
            split = Split(group, columns, explicit=explicit)
            split.check(loss, gathering, impl, reduction=reduction, **chosen)


@case
def denominators(group: Any) -> None:
    every_way(
        group,
        "clustered_infonce",
        clusters,
        {"denominator": "other"},
        {"denominator": "other", "positives": "in"},
        {"denominator": "decoupled"},
        {"denominator": "decoupled", "positives": "in"},
    )


@case
def hardness_and_prior(group: Any) -> None:
    every_way(
        group,
        "clustered_infonce",
        clusters,
        {"hardness": 0.5},
        {"prior": 0.1, "positives": "in"},
        {"denominator": "other", "hardness": 0.4, "prior": 0.05},
        {"denominator": "decoupled", "hardness": 0.4},
    )


@case
def own_samples(group: Any) -> None:
    every_way(group, "clustered_infonce", samples, {}, {"denominator": "other", "positives": "in"})


@case
def levels_of_clusters(group: Any) -> None:
    every_way(
        group,
        "hierarchical_infonce",
        levels,
        {},
        {"positives": "in", "level_weights": [0.2, 0.3, 1.0]},
        {"constraint": "level", "level_weights": [1.0, 0.1, 2.0]},
        {"constraint": "pair"},
    )


@case
def weights_of_levels_have_a_gradient(group: Any) -> None:
    """Alike on all ranks, which sum their shares of it, or under DistributedDataParallel have its mean."""
    for gathering, reduction, ddp in itertools.product(WAYS, ("mean", "none"), (False, True)):
        split = Split(group, levels, explicit=False)
        options = {"reduction": reduction, "constraint": "none" if reduction == "none" else "level"}
        one, ours = (torch.tensor([0.2, 0.3, 1.0], requires_grad=True) for _ in range(2))
        want = functional.hierarchical_infonce(**split.whole, **options, level_weights=one)
        over_ranks = {"gather": gathering, "group": group, "ddp": ddp}
        got = distributed.hierarchical_infonce(**split.mine, **options, level_weights=ours, **over_ranks)
        want.sum().backward()
        got.sum().backward()
        close(sum_over_ranks(ours.grad, group) / (world_size(group) if ddp else 1), one.grad)


@case
def weights_that_sum_to_nothing(group: Any) -> None:
    """On this rank or on all of them, value and gradient are those of one process."""
    for everywhere, gathering in itertools.product((True, False), WAYS):
        split = Split(group, clusters, explicit=False)
        none = split.whole["weights"].detach().clone()
        none[: len(none) if everywhere else split.rows["query"][0]] = 0
        split.whole["weights"] = none.requires_grad_()
        split.mine["weights"] = split.part("weights", none)
        split.check("clustered_infonce", gathering, "auto")


@case
def weights_have_no_second_derivative(group: Any) -> None:
    """Of a mean; of what hangs on the rows of all ranks a rank has its own alone."""
    split = Split(group, clusters, explicit=False)
    loss = distributed.clustered_infonce(**split.mine, impl="chunked", group=group)
    (gradient,) = torch.autograd.grad(loss, [split.mine["weights"]], create_graph=True)
    for leaf in ("weights", "queries"):
        with pytest.raises(NotImplementedError, match="weights: the gradient of a mean over ranks"):
            torch.autograd.grad(gradient.square().sum(), [split.mine[leaf]], retain_graph=True)


@case
def common_tags(group: Any) -> None:
    every_way(
        group,
        "soft_infonce",
        tags,
        {"affinity": "shared"},
        {"affinity": "jaccard"},
        {"affinity": "cosine"},
        {"affinity": "jaccard", "positives": "in"},
    )


@case
def a_kernel_of_vectors(group: Any) -> None:
    for positives in ("out", "in"):
        every_way(group, "soft_infonce", vectors, {"affinity": "kernel", "positives": positives})


@case
def each_query_its_temperature(group: Any) -> None:
    for gathering in WAYS:
        split = Split(group, clusters, explicit=False)
        each = torch.linspace(0.1, 1, len(split.whole["queries"]), dtype=torch.float64)
        want = functional.clustered_infonce(**{**split.whole, "temperature": each}, denominator="other")
        split.mine["temperature"] = cut(each, split.rows["query"], group)
        got = distributed.clustered_infonce(**split.mine, denominator="other", gather=gathering, group=group)
        close(got.detach(), want.detach())


@case
def rows_that_are_not_reduced(group: Any) -> None:
    for gathering, (loss, columns, options) in itertools.product(
        WAYS,
        (
            ("clustered_infonce", clusters, {"denominator": "other"}),
            ("hierarchical_infonce", levels, {}),
            ("soft_infonce", tags, {"affinity": "jaccard"}),
        ),
    ):
        split = Split(group, columns, explicit=True)
        options = {"reduction": "none", **options}
        want = getattr(functional, loss)(**split.whole, **options)
        got = getattr(distributed, loss)(**split.mine, **options, gather=gathering, group=group)
        close(got.detach(), cut(want, split.rows["query"], group).detach())


@case
def keys_that_every_rank_holds(group: Any) -> None:
    """``gather="count"``: the average, and the constraint between levels and pairs, are over all anchors."""
    for loss, columns, options in (
        ("clustered_infonce", clusters, {"denominator": "other", "hardness": 0.3}),
        ("hierarchical_infonce", levels, {"constraint": "level"}),
        ("hierarchical_infonce", levels, {"constraint": "pair"}),
        ("soft_infonce", tags, {"affinity": "jaccard"}),
    ):
        split = Split(group, columns, explicit=True)
        split.mine |= {name: value.detach() for name, value in split.whole.items() if name.startswith("key")}
        want = getattr(functional, loss)(**split.whole, **options)
        got = getattr(distributed, loss)(**split.mine, **options, gather="count", group=group)
        (gradient,) = torch.autograd.grad(got, [split.mine["queries"]])
        (wanted,) = torch.autograd.grad(want, [split.whole["queries"]])
        close(got.detach(), want.detach())
        close(gradient, cut(wanted, split.rows["query"], group))


@case
def keys_and_ranks_without_gradient(group: Any) -> None:
    """Two trips, keys of a momentum encoder, and a rank whose empty batch has no graph: nothing hangs."""
    for options in ({"denominator": "other"}, {"denominator": "other", "positives": "in"}):
        split = Split(group, clusters, explicit=True)
        want = functional.clustered_infonce(**split.whole, **options)
        (wanted,) = torch.autograd.grad(want, [split.whole["queries"]])
        split.mine["keys"] = split.mine["keys"].detach()
        split.mine["temperature"] = 0.4
        if not len(split.mine["queries"]):
            split.mine["queries"] = split.mine["queries"].detach()
        got = distributed.clustered_infonce(**split.mine, **options, gather="ring", group=group)
        got.backward()
        close(got.detach(), want.detach())
        if len(split.mine["queries"]):
            close(split.mine["queries"].grad, cut(wanted, split.rows["query"], group))


@case
def the_same_gradient_twice(group: Any) -> None:
    """A graph that is kept gives its gradient again, whatever the first pass has left."""
    for loss, columns, options in (
        ("clustered_infonce", clusters, {"denominator": "other"}),
        ("hierarchical_infonce", levels, {"constraint": "pair"}),
    ):
        split = Split(group, columns, explicit=True)
        leaves = [split.mine[name] for name in ("queries", "keys", "temperature")]
        value = getattr(distributed, loss)(**split.mine, **options, gather="ring", group=group)
        first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a.equal(b)


@case
def the_definition(group: Any) -> None:
    """It takes all keys at once, on a ring as well; the constraint between pairs is one of all ranks."""
    for gathering, (loss, columns, options) in itertools.product(
        WAYS,
        (
            ("clustered_infonce", clusters, {"denominator": "other"}),
            ("hierarchical_infonce", levels, {"constraint": "pair"}),
            ("soft_infonce", tags, {"affinity": "jaccard"}),
        ),
    ):
        Split(group, columns, explicit=True).check(loss, gathering, "reference", **options)


@case
def second_derivatives(group: Any) -> None:
    """A penalty on the gradients of all rows, where keys are gathered; a ring refuses."""
    for loss, columns in (("clustered_infonce", clusters), ("soft_infonce", tags)):
        options = {"affinity": "cosine"} if loss == "soft_infonce" else {}
        split = Split(group, columns, explicit=True)

        def penalty(arguments: dict[str, Any], value: Tensor) -> list[Tensor]:
            leaves = [arguments["queries"], arguments["keys"]]
            first = torch.autograd.grad(value, leaves, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

        want = penalty(split.whole, getattr(functional, loss)(**split.whole, **options, impl="chunked"))
        over_ranks = {"impl": "chunked", "group": group}
        got = penalty(split.mine, getattr(distributed, loss)(**split.mine, **options, **over_ranks))
        for name, here, there in zip(("queries", "keys"), got, want, strict=True):
            close(here, split.part(name, there))
        value = getattr(distributed, loss)(**split.mine, **options, **over_ranks, gather="ring")
        first = torch.autograd.grad(value, [split.mine["queries"], split.mine["keys"]], create_graph=True)
        with pytest.raises(NotImplementedError, match="a ring has no second derivative; gather='all'"):
            sum(g.square().sum() for g in first).backward()


@case
def variants_in_float32(group: Any) -> None:
    """No further from float64 than plain PyTorch in one process is, but for a little."""
    for loss, columns, options in (
        ("clustered_infonce", clusters, {"denominator": "other", "prior": 0.1}),
        ("hierarchical_infonce", levels, {"positives": "in"}),
        ("soft_infonce", vectors, {"affinity": "kernel"}),
    ):
        for impl in IMPLS:
            split = Split(group, columns, explicit=True)
            exact, plain = (
                getattr(functional, loss)(**arguments, **options, impl="reference").double()
                for arguments in (split.whole, float32(split.whole))
            )
            over_ranks = {"impl": impl, "gather": "ring", "group": group}
            got = getattr(distributed, loss)(**float32(split.mine), **options, **over_ranks)
            assert got.dtype == torch.float32
            assert (got - exact).abs() <= (plain - exact).abs() + 1e-6 * exact.abs()


@case
def statistics_of_the_whole_batch(group: Any) -> None:
    for gathering, impl, explicit in itertools.product(WAYS, IMPLS, (False, True)):
        for options in ({}, {"denominator": "other"}, {"hardness": 0.5, "positives": "in"}):
            split = Split(group, samples, explicit=explicit)
            options = {**options, "return_stats": True}
            loss, want = functional.clustered_infonce(**split.whole, **options)
            ours, got = distributed.clustered_infonce(
                **split.mine, **options, impl=impl, gather=gathering, group=group
            )
            close(ours.detach(), loss.detach())
            for name, here, there in zip(want._fields, got, want, strict=True):
                rows = cut(there, split.rows["query"], group) if there.ndim else there
                torch.testing.assert_close(
                    here, rows, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
                )


@case
def no_rank_holds_all_keys(group: Any) -> None:
    """On a ring no rank makes a tensor longer than the longest block of keys, or its queries."""
    n = 40
    ids, masks = torch.randint(0, 5, (n,)), torch.randint(0, 64, (n,))
    levels = {"query_clusters": ids[:, None].repeat(1, 2), "constraint": "pair"}
    for loss, options in (
        (distributed.clustered_infonce, {"query_clusters": ids}),
        (distributed.clustered_infonce, {"query_clusters": ids, "denominator": "other"}),
        (distributed.hierarchical_infonce, levels),
        (distributed.soft_infonce, {"query_auxiliary": masks, "affinity": "jaccard"}),
    ):
        x = torch.randn(n, 32, requires_grad=True)

        def step(x: Tensor = x, loss: Any = loss, options: Any = options) -> None:
            loss(x, **options, gather="ring", group=group).backward()

        assert n <= longest_with_width(32, step) <= n + 1
