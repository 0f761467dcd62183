"""Two ranks fit k-means on their files; the second may die in its fifth pass (``test_kmeans_ranks.py``)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
import torch.distributed as dist

from wscl_fast import KMeans
from wscl_fast.clustering import FeatureFiles
from wscl_fast.clustering.resume import Checkpoint

SIZE, DIES_IN = 2, 5


def first_has_saved(folder: Path, n_iter: int) -> bool:
    try:
        return bool(torch.load(folder / "state.0")["n_iter"] == n_iter)
    except FileNotFoundError:  # between two states
        return False


def fit(rank: int, folder: Path, store: str, shard_centroids: bool, dies: bool) -> None:
    """Leaves what was found, and the passes that were saved, in ``found{rank}.npz``."""
    ranks.join(rank, SIZE, folder / store)
    save, passes = Checkpoint.save, []

    def saving(self: Checkpoint, centroids: Any, *, n_iter: int, **state: Any) -> None:
        if dies and rank == 1 and n_iter == DIES_IN:
            while not first_has_saved(folder, DIES_IN):  # what the second has not
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, centroids, n_iter=n_iter, **state)
        passes.append(n_iter)

    Checkpoint.save = saving  # type: ignore[method-assign]
    if dies:  # what the other says of it is no news
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    model = KMeans(
        40, init="k-means||", tol=0.0, max_iter=12, sharded=True, shard_centroids=shard_centroids,
        checkpoint=folder / "state",
    )  # fmt: skip
    model.fit(FeatureFiles(folder / f"{rank}.npy", memory=1 << 18))
    np.savez(folder / f"found{rank}.npz", labels=model.labels_, centers=model.cluster_centers_, passes=passes)
    dist.destroy_process_group()
