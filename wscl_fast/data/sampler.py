"""Batches in which samples of one cluster come together, so that anchors have positives.

The definition draws pairs within clusters; a uniform batch of 256 out of thousands of samples in hundreds of
clusters leaves most anchors without a positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wscl_fast.data.checks import check_ids, check_int


class ClusterBatchSampler:
    """Epochs of shuffled batches in which each cluster's samples are drawn in groups.

    Every cluster is shuffled and dealt into groups of at least ``samples_per_cluster`` (a smaller cluster is
    one group); the groups are shuffled and laid end to end, and that line is cut into batches. A sample comes
    once per epoch at most. A group may straddle the edge of a batch: at most one per edge.

    Args:
        clusters: int64 [n], the cluster of each sample; −1 is no cluster, drawn alone.
        batch_size: samples in a batch.
        samples_per_cluster: the least number drawn together; 1 is a uniform shuffle.
        seed: of the shuffles; an epoch's batches depend on (seed, epoch) only.
        drop_last: leave out the samples beyond the last full batch, other ones in each epoch.

    Raises:
        TypeError: if clusters are not integers, or another argument is of another type.
        ValueError: if clusters are not one-dimensional, a number is out of range, or no full batch exists.
    """

    def __init__(
        self,
        clusters: NDArray[np.int64],
        batch_size: int,
        *,
        samples_per_cluster: int = 2,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        clusters = check_ids(clusters, "clusters")
        batch_size, seed = check_int(batch_size, "batch_size"), check_int(seed, "seed")
        samples_per_cluster = check_int(samples_per_cluster, "samples_per_cluster")
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last: expected a bool, got {type(drop_last).__name__}")
        if clusters.size and clusters.min() < -1:
            raise ValueError(f"clusters: expected ids from −1 (no cluster) up, got {clusters.min()}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 1 <= samples_per_cluster <= batch_size:
            raise ValueError(
                f"samples_per_cluster: expected 1 to batch_size = {batch_size}, got {samples_per_cluster}"
            )
        if drop_last and clusters.size < batch_size:
            raise ValueError(
                f"batch_size: {batch_size} is more than the {clusters.size} samples; drop_last leaves nothing"
            )
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.clusters = clusters
        self.batch_size = batch_size
        self.samples_per_cluster = samples_per_cluster
        self.seed = seed
        self.drop_last = drop_last

    def refresh(self, clusters_of_samples: Any) -> None:
        """Draw by a new clustering from the next epoch on, as a target of a `ClusterScheduler`.

        Args:
            clusters_of_samples: integers [n], a tensor or an array: the cluster of each sample now.

        Raises:
            TypeError: if they are not integers.
            ValueError: if there are not as many as samples, or one is below −1.
        """
        if hasattr(clusters_of_samples, "cpu"):
            clusters_of_samples = clusters_of_samples.cpu()
        clusters = np.asarray(clusters_of_samples)
        if not np.issubdtype(clusters.dtype, np.integer):
            raise TypeError(f"clusters_of_samples: expected integers, got {clusters.dtype}")
        if clusters.shape != self.clusters.shape:
            raise ValueError(
                f"clusters_of_samples: expected shape {self.clusters.shape}, one id a sample,"
                f" got {clusters.shape}"
            )
        if clusters.size and clusters.min() < -1:
            raise ValueError(
                f"clusters_of_samples: expected ids from −1 (no cluster) up, got {clusters.min()}"
            )
        self.clusters = clusters.astype(np.int64)

    def __len__(self) -> int:
        n = self.clusters.size
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """The batches of one epoch, each int64 [batch_size] positions into ``clusters``.

        Args:
            epoch: 0 or more; the same epoch gives the same batches.

        Raises:
            TypeError: if it is not an int.
            ValueError: if it is negative.
        """
        if check_int(epoch, "epoch") < 0:
            raise ValueError(f"epoch: expected 0 or more, got {epoch}")
        order = self._order(np.random.default_rng([self.seed, epoch]))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        shuffled = rng.permutation(self.clusters.size)
        if self.samples_per_cluster == 1:
            return shuffled
        clusters = self.clusters[shuffled]
        by_cluster = np.argsort(clusters, kind="stable")
        shuffled, clusters = shuffled[by_cluster], clusters[by_cluster]
        starts = np.flatnonzero(np.diff(clusters, prepend=-2))
        sizes = np.diff(starts, append=clusters.size)
        cluster = np.repeat(np.arange(sizes.size), sizes)
        groups = np.maximum(sizes // self.samples_per_cluster, 1)
        if clusters.size and clusters[0] == -1:
            groups[0] = sizes[0]  # no cluster: everyone is a group
        offset = np.cumsum(groups) - groups
        rank = np.arange(clusters.size) - starts[cluster]
        # Balanced groups: a remainder is spread over the cluster's groups instead of being left alone.
        group = offset[cluster] + rank * groups[cluster] // sizes[cluster]
        place = rng.permutation(int(groups.sum()))
        return shuffled[np.argsort(place[group], kind="stable")]


def anchor_share(clusters_in_batch: NDArray[np.int64]) -> float:
    """Share of samples whose cluster has another sample in the batch.

    Equals ``np.mean([(c != -1) and (clusters == c).sum() > 1 for c in clusters])``.

    Args:
        clusters_in_batch: int64 [B]; −1 is no cluster and never shares.

    Returns:
        0 to 1; 0 for an empty batch.

    Raises:
        TypeError: if clusters are not integers.
        ValueError: if they are not one-dimensional.
    """
    if np.size(clusters_in_batch) == 0:  # its dtype says nothing
        return 0.0
    clusters = check_ids(clusters_in_batch, "clusters_in_batch")
    ids, counts = np.unique(clusters, return_counts=True)
    return float(counts[(ids != -1) & (counts > 1)].sum() / clusters.size)
