"""Several processes give what one gives with the whole batch: 2, 3 and 4 of them, over gloo."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from rank_cases import CASES

from wscl_fast.distributed import broadcast, gather, rank, sum_over_ranks, world_size

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("rank_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", CASES)
def test_ranks(name: str, size: int, failures: dict[str, str]) -> None:
    if text := failures.get(f"{name}-{size}"):
        pytest.fail(text, pytrace=False)


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather(x) is x
    assert sum_over_ranks(x).equal(x)
    assert broadcast(x).equal(x)
    assert not sum_over_ranks(x).requires_grad


def test_refusals() -> None:
    with pytest.raises(TypeError, match="tensor: expected a tensor, got list"):
        gather([1])
    with pytest.raises(ValueError, match="tensor: expected rows"):
        gather(torch.tensor(1))
