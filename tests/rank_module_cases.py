"""The loss modules over ranks, alone and under DistributedDataParallel, as one process has them.

``tests/test_distributed.py`` reports it.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from rank_loss_cases import WAYS, levels, tags
from ranks import close, cut, longest_with_width, uneven
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wscl_fast import (
    CLIPLoss,
    ClusteredInfoNCE,
    ClusterQueue,
    HierarchicalInfoNCE,
    KMeans,
    SigLIPLoss,
    SoftInfoNCE,
    distributed,
    functional,
)
from wscl_fast.clustering import BalancedKMeans, BisectingKMeans, ClusterScheduler
from wscl_fast.distributed import rank, sum_over_ranks, world_size

CASES = {}


def case(function):  # type: ignore[no-untyped-def]
    CASES[function.__name__] = function
    return function


@case
def options_through_the_module(group: Any) -> None:
    """Own views, views across, other denominators."""
    me, rows = rank(group), uneven(group)
    for gathering, settings in itertools.product(
        WAYS,
        (
            {"denominator": "other", "hardness": 0.4},
            {"denominator": "decoupled", "positives": "in"},
            {"denominator": "other", "own_views": True},
            {"own_views": True, "contrast": "cross"},
            {"contrast": "cross", "reduction": "sum"},
        ),
    ):
        whole = torch.randn(sum(rows), 2, 4, dtype=torch.float64, requires_grad=True)
        ids = torch.randint(-1, 3, (sum(rows),))
        one = ClusteredInfoNCE(0.3, **settings)(whole, ids)
        one.backward()
        mine = cut(whole, rows, group)
        loss = ClusteredInfoNCE(0.3, **settings, gather=gathering, group=group)(mine, ids.split(rows)[me])
        loss.backward()
        close(loss.detach(), one.detach())
        close(mine.grad, whole.grad.split(rows)[me])


@case
def statistics_of_views_across(group: Any) -> None:
    me, rows = rank(group), uneven(group)
    whole, ids = torch.randn(sum(rows), 3, 4, dtype=torch.float64), torch.randint(-1, 3, (sum(rows),))
    _, want = ClusteredInfoNCE(0.3, contrast="cross")(whole, ids, return_stats=True)
    for gathering in WAYS:
        loss_fn = ClusteredInfoNCE(0.3, contrast="cross", gather=gathering, group=group)
        _, got = loss_fn(cut(whole, rows, group), ids.split(rows)[me], return_stats=True)
        for name, here, there in zip(want._fields, got, want, strict=True):
            part = there.split([3 * n for n in rows])[me] if there.ndim else there
            torch.testing.assert_close(here, part, msg=lambda m, name=name: f"{name}: {m}")


@case
def levels_and_tags_through_the_modules(group: Any) -> None:
    me, rows = rank(group), uneven(group)
    for gathering, (make, settings, known) in itertools.product(
        WAYS,
        (
            (HierarchicalInfoNCE, {"constraint": "pair"}, levels(sum(rows))["clusters"]),
            (SoftInfoNCE, {"affinity": "jaccard"}, tags(sum(rows))["auxiliary"]),
            (SoftInfoNCE, {"affinity": "shared", "contrast": "cross"}, tags(sum(rows))["auxiliary"]),
        ),
    ):
        whole = torch.randn(sum(rows), 2, 4, dtype=torch.float64, requires_grad=True)
        one = make(temperature=0.3, **settings)(whole, known)
        one.backward()
        mine = cut(whole, rows, group)
        loss = make(temperature=0.3, **settings, gather=gathering, group=group)(mine, known.split(rows)[me])
        loss.backward()
        close(loss.detach(), one.detach())
        close(mine.grad, whole.grad.split(rows)[me])


@case
def two_sides_through_the_modules(group: Any) -> None:
    """CLIP and SigLIP over all ranks' pairs, each row its own or of a cluster; one rank has none."""
    me, rows = rank(group), uneven(group)
    for clip in (True, False):
        for gathering in ("all", "ring"):
            for clustered in (False, True):
                for reduction in ("mean", "sum"):
                    make = CLIPLoss if clip else SigLIPLoss
                    one = make(0.3, reduction=reduction).double()
                    ours = make(0.3, reduction=reduction, gather=gathering, group=group).double()
                    x, y = torch.randn(2, sum(rows), 4, dtype=torch.float64)
                    x, y = x.requires_grad_(), y.requires_grad_()
                    ids = torch.randint(-1, 4, (sum(rows),)) if clustered else None
                    want = one(x, y, ids)
                    want.backward()
                    mine = [cut(side, rows, group) for side in (x, y)]
                    got = ours(*mine, None if ids is None else ids.split(rows)[me])
                    got.backward()
                    close(got.detach(), want.detach())
                    for here, there in zip(mine, (x, y), strict=True):
                        close(here.grad, there.grad.split(rows)[me])
                    for here, there in zip(ours.parameters(), one.parameters(), strict=True):
                        close(sum_over_ranks(here.grad, group), there.grad)


@case
def two_sides_without_ids(group: Any) -> None:
    """No row's own id is the one that says "no cluster", whichever it is; arguments go by their names."""
    me, rows = rank(group), uneven(group)
    x, y = torch.randn(2, sum(rows), 4, dtype=torch.float64)
    mine = [side.split(rows)[me] for side in (x, y)]
    for loss, gathering in itertools.product(("clip_loss", "siglip_loss"), WAYS):
        compute = getattr(distributed, loss)
        over_ranks: dict[str, Any] = {"gather": gathering, "group": group}
        want = getattr(functional, loss)(x, y)
        for ignore_index in (0, 2, sum(rows) - 1):
            close(compute(*mine, ignore_index=ignore_index, **over_ranks), want)
        for sides, error in (
            ((x, y[:3]), f"y: expected {len(x)} rows as in x where y_clusters is None, got 3"),
            ((x, y[:, None]), r"y: expected a matrix \[rows, d\]"),
            ((x, y[:, :2]), "y: expected 4 columns as in x"),
        ):
            with pytest.raises(ValueError, match=error):
                compute(*sides, **over_ranks)
        with pytest.raises(TypeError, match="x_clusters: expected int64"):
            compute(x, y, x_clusters=torch.arange(len(x), dtype=torch.int32), **over_ranks)
        with pytest.raises(ValueError, match="x: expected one dtype on all ranks"):
            compute(*((x, y) if me else (x.float(), y.float())), **over_ranks)
    with pytest.raises(ValueError, match="x_weights: expected shape"):
        distributed.clip_loss(x, y, x_weights=torch.ones(1), group=group)
    ids = torch.arange(len(x))
    for gathering in WAYS:
        with pytest.raises(ValueError, match="y: expected one dtype on all ranks"):
            distributed.clip_loss(x, y if me else y.float(), x_clusters=ids, gather=gathering, group=group)


@case
def clip_with_every_option(group: Any) -> None:
    """Sides of different lengths, "in" and "out", weights, either implementation, unreduced rows."""
    me, size = rank(group), world_size(group)
    of_x, of_y = ([9, 0], [4, 7]) if size == 2 else ([7, 0, 5, 3][:size], [0, 8, 6, 2][:size])
    for gathering, impl, positives, reduction in itertools.product(
        WAYS, ("auto", "chunked"), ("out", "in"), ("mean", "sum", "none")
    ):
        whole = {}
        for side, rows in (("x", of_x), ("y", of_y)):
            whole[side] = torch.randn(sum(rows), 4, dtype=torch.float64, requires_grad=True)
            whole[f"{side}_clusters"] = torch.randint(-1, 3, (sum(rows),))
            whole[f"{side}_weights"] = torch.rand(sum(rows), dtype=torch.float64, requires_grad=True)
        mine = {name: cut(value, of_x if name[0] == "x" else of_y, group) for name, value in whole.items()}
        options = {"positives": positives, "reduction": reduction}
        t, ours = (torch.tensor(0.4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        want = functional.clip_loss(**whole, **options, temperature=t)
        over_ranks = {"impl": impl, "gather": gathering, "group": group}
        got = distributed.clip_loss(**mine, **options, temperature=ours, **over_ranks)
        want.sum().backward()
        got.sum().backward()
        if reduction == "none":
            x, y = want.detach().split([sum(of_x), sum(of_y)])
            want = torch.cat([x.split(of_x)[me], y.split(of_y)[me]])
        close(got.detach(), want.detach())
        close(sum_over_ranks(ours.grad, group), t.grad)
        for name in ("x", "y", "x_weights", "y_weights"):
            rows = of_x if name[0] == "x" else of_y
            close(mine[name].grad, whole[name].grad.split(rows)[me])


@case
def a_base_temperature_beside_one_with_a_gradient(group: Any) -> None:
    """Learnt, or given with the call; the ranks' gradients sum to one process', or their mean is that."""
    me, rows = rank(group), uneven(group)
    for gathering, ddp, learnt, reduction in itertools.product(
        WAYS, (False, True), (False, True), ("mean", "none")
    ):
        whole, ids = torch.randn(sum(rows), 4, dtype=torch.float64), torch.randint(-1, 3, (sum(rows),))
        found = []
        for settings, x, z in (
            ({}, whole, ids),
            ({"gather": gathering, "group": group, "ddp": ddp}, *(t.split(rows)[me] for t in (whole, ids))),
        ):
            loss_fn = ClusteredInfoNCE(0.2, learnt, base_temperature=0.07, reduction=reduction, **settings)
            loss_fn.double()
            given = None if learnt else torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
            leaf = loss_fn.log_scale if learnt else given
            found += torch.autograd.grad(loss_fn(x, z, temperature=given).sum(), [leaf])
        close(sum_over_ranks(found[1], group) / (world_size(group) if ddp else 1), found[0])


@case
def clip_on_a_ring_refuses_ids_that_changed(group: Any) -> None:
    """All ranks change theirs, so that nobody waits for who refuses."""
    x, y = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    of_x, of_y = torch.arange(4), torch.arange(4)
    for changed in (of_x, of_y):
        loss = distributed.clip_loss(x, y, x_clusters=of_x, y_clusters=of_y, gather="ring", group=group)
        changed += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@case
def rows_of_one_rank_say_nothing_of_the_others(group: Any) -> None:
    """No warning of no positives where other ranks may have some; of the mean all ranks have the same."""
    me = rank(group)
    for gathering, (reduction, warned) in itertools.product(WAYS, (("none", 0), ("mean", 1))):
        loss_fn = ClusteredInfoNCE(reduction=reduction, gather=gathering, group=group)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for ids in (torch.arange(4) // (1 if me else 2) + 9 * me, torch.arange(4) + 9 * me):
                loss_fn(torch.randn(4, 3), ids)
        assert len([w for w in caught if "no query of this batch" in str(w.message)]) == warned


@case
def clip_on_a_ring_is_one_trip(group: Any) -> None:
    """No rank makes a tensor of all rows; halves travel as they are; a side alone; no second derivative."""
    n = 40
    x, y = (torch.randn(n, 32, requires_grad=True) for _ in range(2))
    ids = torch.randint(0, 5, (n,))
    options: dict[str, Any] = {"x_clusters": ids, "temperature": 3.0, "gather": "ring", "group": group}
    longest = longest_with_width(32, lambda: distributed.clip_loss(x, y, **options).backward())
    graph = torch.autograd.grad(distributed.clip_loss(x, y, **options), [x, y], create_graph=True)
    alone = distributed.clip_loss(x.detach(), y, **options)
    alone.backward()
    halves = [side.detach().bfloat16().requires_grad_() for side in (x, y)]
    distributed.clip_loss(*halves, **options).backward()
    with torch.no_grad():
        nothing = distributed.clip_loss(x, y, **options)
    assert n <= longest <= n + 1
    with pytest.raises(NotImplementedError, match="a ring has no second derivative"):
        sum(g.square().sum() for g in graph).backward()
    close(nothing, alone.detach())
    close(graph[1].detach(), y.grad / 2)
    for half, side in zip(halves, (x, y), strict=True):
        assert half.grad.dtype == torch.bfloat16
        close(half.grad.double(), side.grad.double() / (1 if side is x else 2), 0.05)


@case
def through_ddp(group: Any) -> None:
    """Encoder and temperature under DistributedDataParallel learn what one process with the batch does."""
    size, me = world_size(group), rank(group)
    for gathering in ("all", "ring"):
        for reduction in ("mean", "sum"):
            settings = {"temperature": 0.4, "learnable_temperature": True, "reduction": reduction}
            rows = [5, 9, 2, 6][:size]
            inputs = torch.randn(sum(rows), 2, 4, dtype=torch.float64)
            clusters = torch.randint(-1, 3, (sum(rows),))
            torch.manual_seed(1)
            one = Model(ClusteredInfoNCE(**settings)).double()
            torch.manual_seed(1)
            loss_fn = ClusteredInfoNCE(**settings, gather=gathering, group=group, ddp=True)
            ours = DistributedDataParallel(Model(loss_fn).double(), process_group=group)
            one_loss = one(inputs, clusters)
            one_loss.backward()
            loss = ours(inputs.split(rows)[me], clusters.split(rows)[me])
            loss.backward()
            close(loss.detach(), one_loss.detach())
            for got, want in zip(ours.parameters(), one.parameters(), strict=True):
                close(got.grad, want.grad)


class Model(torch.nn.Module):
    def __init__(self, loss_fn: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        self.loss_fn = loss_fn

    def forward(self, inputs: Tensor, clusters: Tensor) -> Tensor:
        return self.loss_fn(self.encoder(inputs), clusters)


@case
def copies_share_the_group(group: Any) -> None:
    """Of modules, a queue, k-means and its scheduler, also within a model; a pickle would be of no use."""
    on_ranks = {"sharded": True, "group": group}
    modules = [
        *(loss(group=group) for loss in (CLIPLoss, SigLIPLoss, ClusteredInfoNCE, HierarchicalInfoNCE)),
        SoftInfoNCE("jaccard", gather="all", group=group),
        ClusterQueue(4, 2, gather="all", group=group),
    ]
    models = [KMeans(3, **on_ranks), BisectingKMeans(3, **on_ranks), BalancedKMeans(3, **on_ranks)]
    scheduler = ClusterScheduler((3, 2), **on_ranks)
    for one in (*modules, *models):
        for made in (copy.copy(one), copy.deepcopy(one), copy.deepcopy([one])[0]):
            assert made is not one
            assert made.group is group
            assert repr(made) == repr(one)
    for one in (nn.ModuleList(modules), *models, scheduler):
        with pytest.raises(TypeError, match=r"group: expected None in a .* that is pickled"):
            pickle.dumps(one)
    together = copy.deepcopy(nn.ModuleList([modules[0], modules[0]]))
    assert together[0] is together[1]
    assert together[0].log_scale is not modules[0].log_scale
    made = copy.deepcopy(scheduler)
    assert made.models[0] is not scheduler.models[0]
    assert made.ranks.group is made.models[0].group is group
