"""Shards of several processes give the clusters that one process finds on all rows: 2, 3 and 4 of them."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import killed_rank
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from kmeans_rank_cases import CASES

from wscl_fast import KMeans

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


@pytest.mark.parametrize("shard_centroids", [False, True])
def test_one_rank_is_killed_and_all_go_on(shard_centroids: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6000, 16)).astype(np.float32)
    np.save(tmp_path / "0.npy", x[:3500])
    np.save(tmp_path / "1.npy", x[3500:])
    whole = KMeans(40, init="k-means||", tol=0.0, max_iter=12).fit(x)
    fit = partial(ranks.end_codes, killed_rank.fit, killed_rank.SIZE)
    other, killed = fit(tmp_path, "first", shard_centroids, True)
    assert killed == -signal.SIGKILL
    assert other not in (0, -signal.SIGKILL, None)  # it was told that the other is gone
    saved = {file: torch.load(tmp_path / file)["n_iter"] for file in os.listdir(tmp_path) if "state" in file}
    assert saved == {"state.0": 5, "state.0.before": 4, "state.1": 4, "state.1.before": 3}
    assert fit(tmp_path, "second", shard_centroids, False) == [0, 0]
    found = [np.load(tmp_path / f"found{number}.npz") for number in range(2)]
    assert np.array_equal(np.concatenate([one["labels"] for one in found]), whole.labels_)
    for one in found:
        np.testing.assert_allclose(one["centers"], whole.cluster_centers_, rtol=1e-5, atol=1e-6)
        assert one["passes"].tolist() == list(range(5, 13))  # what was done was not done again
    if not shard_centroids:
        return
    # A torn file of one rank stops both, and neither waits for the other.
    (tmp_path / "state.1").write_bytes(b"torn")
    assert fit(tmp_path, "third", shard_centroids, False) == [1, 1]
