"""Several processes give what one gives with the whole batch: 2, 3 and 4 of them, over gloo."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import rank_cases
import rank_loss_cases
import rank_module_cases
import ranks
import torch
import torch.distributed as dist

from wscl_fast import ClusteredInfoNCE, functional
from wscl_fast.distributed import (
    broadcast,
    clustered_infonce,
    first_row,
    gather,
    rank,
    sum_over_ranks,
    world_size,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)

TALK = (gather, sum_over_ranks, broadcast)
MODULES = (rank_cases, rank_loss_cases, rank_module_cases)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made: dict[str, str] = {}
    for module in MODULES:
        made |= ranks.run(module.__name__, tmp_path_factory.mktemp(module.__name__))
    return made


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", [name for module in MODULES for name in module.CASES])
def test_ranks(name: str, size: int, failures: dict[str, str]) -> None:
    if text := failures.get(f"{name}-{size}"):
        pytest.fail(text, pytrace=False)


@pytest.mark.parametrize(
    "said",
    [torch.zeros(3, dtype=torch.int16), [torch.zeros(2), torch.zeros(2, 3).T]],
    ids=["int16", "strided"],
)
def test_what_nccl_cannot_carry_is_told(said: object) -> None:
    with pytest.raises(AssertionError, match="NCCL carries no"):
        ranks.check_carried(said)
    ranks.check_carried([torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool), 5])


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather(x) is x
    assert sum_over_ranks(x).equal(x)
    assert broadcast(x).equal(x)
    assert not sum_over_ranks(x).requires_grad
    for copy in (sum_over_ranks(x), broadcast(x)):  # as with several
        before = x.detach().clone()
        copy /= 2
        assert x.equal(before)


@pytest.mark.parametrize(
    "call",
    [world_size, rank, *(partial(f, torch.ones(2)) for f in TALK)],
    ids=["world_size", "rank", *(f.__name__ for f in TALK)],
)
def test_a_process_that_is_not_in_the_group_is_told(
    call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch numbers it −1, and leaves what it gives as it is."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, lambda group: -1)
    with pytest.raises(ValueError, match="group: expected a process group that has this process"):
        call(group=dist.GroupMember.NON_GROUP_MEMBER)


def test_one_process_has_the_loss_of_one_process() -> None:
    x, ids = torch.randn(20, 4), torch.randint(-1, 4, (20,))
    keys, key_ids = torch.randn(30, 4), torch.randint(-1, 4, (30,))
    for gathering in ("all", "ring", "count"):
        for options in ({}, {"keys": keys, "key_clusters": key_ids}, {"exclude_self": False}):
            weights = torch.rand(20, requires_grad=True)
            arguments = {"queries": x, "query_clusters": ids, "weights": weights, **options}
            for reduction in ("mean", "sum", "none"):
                got = clustered_infonce(**arguments, gather=gathering, reduction=reduction)
                want = functional.clustered_infonce(**arguments, reduction=reduction)
                torch.testing.assert_close(got, want)
                ours, theirs = (torch.autograd.grad(loss.sum(), weights)[0] for loss in (got, want))
                torch.testing.assert_close(ours, theirs)
    module = ClusteredInfoNCE(gather="ring", ddp=True)
    torch.testing.assert_close(module(x, ids), ClusteredInfoNCE()(x, ids))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gather": "some"}, ValueError, "gather: expected one of 'all', 'ring', 'count', got 'some'"),
        ({"queries": [1.0]}, TypeError, "queries: expected a tensor, got list"),
        ({"query_clusters": torch.zeros(4)}, TypeError, "query_clusters: expected int64"),
        ({"key_clusters": torch.arange(4)}, ValueError, "key_clusters: expected None where keys is None"),
        ({"keys": torch.randn(3, 2), "key_clusters": torch.arange(2)}, ValueError, "key_clusters: expected"),
        ({"exclude_self": "yes"}, TypeError, "exclude_self: expected a bool or a tensor, got str"),
        (
            {"keys": torch.randn(3, 2), "key_clusters": torch.arange(3), "exclude_self": True},
            ValueError,
            "exclude_self: expected a key for each of the 4 queries, got 3 keys",
        ),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\)"),
        ({"positives": "both"}, ValueError, "positives: expected one of"),
        ({"reduction": "median"}, ValueError, "reduction: expected one of"),
        ({"ddp": "no"}, TypeError, "ddp: expected a bool, got str"),
        ({"return_stats": 1}, TypeError, "return_stats: expected a bool, got int"),
        (
            {"weights": torch.full((4,), torch.nan), "query_clusters": torch.zeros(4).long()},
            ValueError,
            "weights",
        ),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"queries": torch.randn(4, 2), "query_clusters": torch.arange(4)}
    with pytest.raises(error, match=message):
        clustered_infonce(**{**good, **change})
    with pytest.raises(ValueError, match="gather: expected 'none', 'all', 'ring' or 'count'"):
        ClusteredInfoNCE(gather="some")


@pytest.mark.parametrize("collective", [gather, first_row])
def test_rows_are_asked_for(collective: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="tensor: expected a tensor, got list"):
        collective([1])
    with pytest.raises(ValueError, match="tensor: expected rows"):
        collective(torch.tensor(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sum_over_ranks([1]), TypeError, "tensor: expected a tensor, got list"),
        (lambda: broadcast(None), TypeError, "tensor: expected a tensor, got NoneType"),
        (lambda: broadcast(torch.ones(2), 7), ValueError, "source: expected a rank from 0 to 0, got 7"),
        (lambda: broadcast(torch.ones(2), -1), ValueError, "source: expected a rank from 0 to 0, got -1"),
        (lambda: broadcast(torch.ones(2), "0"), TypeError, "source: expected an int, got str"),
        (lambda: rank("all"), TypeError, "group: expected a process group of torch.distributed or None"),
        (lambda: world_size(3), TypeError, "group: expected a process group .* got int"),
        (lambda: gather(torch.ones(2), group=[0]), TypeError, "group: expected a process group .* got list"),
    ],
)
def test_one_process_looks_at_its_arguments_too(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
