"""Shards of several processes give the clusters that one process finds on all rows: 2, 3 and 4 of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


# Two ranks, of which the second dies in its fifth pass: it has not saved what the first has.
FIT = """
import os, signal, sys, time
import numpy as np, torch, torch.distributed as dist
from wscl_fast import KMeans
from wscl_fast.clustering import FeatureFiles
from wscl_fast.clustering.resume import Checkpoint

rank, shard_centroids, dies = map(int, sys.argv[1:4])
folder, store = sys.argv[4:]
torch.set_num_threads(1)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
dist.init_process_group("gloo", init_method=f"file://{folder}/{store}", rank=rank, world_size=2)
save, passes = Checkpoint.save, []

def first_has_saved(n_iter):
    try:
        return torch.load(f"{folder}/state.0")["n_iter"] == n_iter
    except FileNotFoundError:  # between two states
        return False

def saving(self, centroids, *, n_iter, **state):
    if dies and rank == 1 and n_iter == 5:
        while not first_has_saved(5):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, centroids, n_iter=n_iter, **state)
    passes.append(n_iter)

Checkpoint.save = saving
model = KMeans(
    40, init="k-means||", tol=0.0, max_iter=12, sharded=True, shard_centroids=bool(shard_centroids),
    checkpoint=f"{folder}/state",
)
model.fit(FeatureFiles(f"{folder}/{rank}.npy", memory=1 << 18))
np.savez(f"{folder}/found{rank}.npz", labels=model.labels_, centers=model.cluster_centers_, passes=passes)
dist.destroy_process_group()
"""


def fit(folder: Path, store: str, shard_centroids: bool, dies: bool) -> list[int]:
    """How the processes ended."""
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                FIT,
                str(number),
                str(int(shard_centroids)),
                str(int(dies)),
                folder,
                store,
            ],
            stderr=subprocess.DEVNULL if dies else None,
        )
        for number in range(2)
    ]
    try:
        return [child.wait(timeout=120) for child in children[::-1]]
    finally:
        for child in children:
            child.kill()


@pytest.mark.parametrize("shard_centroids", [False, True])
def test_one_rank_is_killed_and_all_go_on(shard_centroids: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6000, 16)).astype(np.float32)
    np.save(tmp_path / "0.npy", x[:3500])
    np.save(tmp_path / "1.npy", x[3500:])
    whole = KMeans(40, init="k-means||", tol=0.0, max_iter=12).fit(x)
    killed, other = fit(tmp_path, "first", shard_centroids, dies=True)
    assert killed == -signal.SIGKILL
    assert other not in (0, -signal.SIGKILL)  # it was told that the other is gone
    saved = {file: torch.load(tmp_path / file)["n_iter"] for file in os.listdir(tmp_path) if "state" in file}
    assert saved == {"state.0": 5, "state.0.before": 4, "state.1": 4, "state.1.before": 3}
    assert fit(tmp_path, "second", shard_centroids, dies=False) == [0, 0]
    found = [np.load(tmp_path / f"found{number}.npz") for number in range(2)]
    assert np.array_equal(np.concatenate([one["labels"] for one in found]), whole.labels_)
    for one in found:
        np.testing.assert_allclose(one["centers"], whole.cluster_centers_, rtol=1e-5, atol=1e-6)
        assert one["passes"].tolist() == list(range(5, 13))  # what was done was not done again
    if not shard_centroids:
        return
    # A torn file of one rank stops both, and neither waits for the other.
    (tmp_path / "state.1").write_bytes(b"torn")
    assert fit(tmp_path, "third", shard_centroids, dies=False) == [1, 1]
