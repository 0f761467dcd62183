"""Shards of several processes give the clusters that one process finds on all rows: 2, 3 and 4 of them."""

from __future__ import annotations

import pytest
import ranks
import torch.distributed as dist
from kmeans_rank_cases import CASES

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch was built without gloo"
)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("kmeans_rank_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", CASES)
def test_ranks(name: str, size: int, failures: dict[str, str]) -> None:
    if text := failures.get(f"{name}-{size}"):
        pytest.fail(text, pytrace=False)
