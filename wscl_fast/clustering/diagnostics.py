"""How good a clustering is: sizes, H(Z), I(Z;T) and H(Z|T), exact for the empirical distribution, in bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from wscl_fast.clustering.base import NO_CLUSTER, IdArray

UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class ClusterReport:
    """What `diagnose` found.

    Attributes:
        n_samples: samples given, those without a cluster included.
        n_ignored: samples without a cluster (id −1), left out of everything below.
        n_clusters: clusters with at least one sample.
        sizes: samples per cluster, largest first.
        n_singletons: clusters of one sample, which give no positive pair.
        entropy: H(Z) in bits; it bounds the Cl-InfoNCE objective.
        n_labelled: samples with a cluster and a known label; None without labels. The three below are
            over these samples, and None where there is none.
        label_entropy: H(T) in bits, the most that I(Z;T) can reach.
        mutual_information: I(Z;T) in bits; higher is better.
        conditional_entropy: H(Z|T) in bits; lower is better. H(Z) = I(Z;T) + H(Z|T) if all labels are known.
    """

    n_samples: int
    n_ignored: int
    n_clusters: int
    sizes: tuple[int, ...]
    n_singletons: int
    entropy: float
    n_labelled: int | None = None
    label_entropy: float | None = None
    mutual_information: float | None = None
    conditional_entropy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {**asdict(self), "sizes": list(self.sizes)}

    def __str__(self) -> str:
        """A few lines to read."""
        used = self.n_samples - self.n_ignored
        lines = [f"{used} of {self.n_samples} samples in {self.n_clusters} clusters"]
        if self.sizes:
            lines.append(
                f"sizes: largest {self.sizes[0]}, median {np.median(self.sizes):g}, "
                f"smallest {self.sizes[-1]}; {self.n_singletons} singletons"
            )
        lines.append(f"H(Z) = {self.entropy:.3f} bits")
        if self.mutual_information is not None:
            lines.append(
                f"I(Z;T) = {self.mutual_information:.3f} bits of H(T) = {self.label_entropy:.3f}, "
                f"H(Z|T) = {self.conditional_entropy:.3f} bits, over {self.n_labelled} labelled samples"
            )
        return "\n".join(lines)


def entropy(counts: npt.ArrayLike) -> float:
    """Entropy in bits of the distribution proportional to `counts`; zeros add nothing.

    Args:
        counts: finite numbers of at least 0, of any shape.

    Raises:
        TypeError: no numbers.
        ValueError: one is negative, NaN or infinite.
    """
    counts = np.asarray(counts)
    if counts.size and counts.dtype.kind not in "iuf":
        raise TypeError(f"counts: expected numbers, got {counts.dtype}")
    bad = counts[~(np.isfinite(counts) & (counts >= 0))]
    if bad.size:
        raise ValueError(f"counts: expected finite numbers of at least 0, got {bad[0]}")
    # In order, so that the same counts have the same entropy to the last bit, whichever comes first; in units
    # of the largest, so that their sum is within range.
    counts = np.sort(counts[counts > 0].astype(np.float64))
    if len(counts) < 2:
        return 0.0
    share = counts / counts[-1]
    p = share / share.sum()
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def diagnose(
    clusters: Sequence[int] | npt.NDArray[Any] | Tensor,
    labels: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
) -> ClusterReport:
    """Sizes and entropies of a clustering, and what it tells about the downstream labels.

    With `H` the entropy of the empirical distribution, `I(Z;T) = H(Z) + H(T) − H(Z,T)` and
    `H(Z|T) = H(Z,T) − H(T)`. Samples whose cluster is −1 are left out and counted; samples whose label is
    −1 (unknown) count in H(Z) and are left out of I(Z;T), H(Z|T) and H(T).

    Source: Tsai et al., ICLR 2022, arXiv 2202.06670, section 3.3.

    Args:
        clusters: cluster ids, integers [n], −1 for no cluster.
        labels: downstream labels, integers [n], −1 for unknown; or None.

    Raises:
        TypeError: ids or labels are not integers.
        ValueError: not 1-D, below −1, above what int64 holds, no sample, or different lengths.
    """
    z = _as_ids(clusters, "clusters")
    if not len(z):
        raise ValueError("clusters: expected at least one sample, got none")
    placed = z != NO_CLUSTER
    sizes = np.sort(np.unique(z[placed], return_counts=True)[1])[::-1]
    n_labelled, h_t, information, conditional = None, None, None, None
    if labels is not None:
        t = _as_ids(labels, "labels")
        if len(t) != len(z):
            raise ValueError(f"labels: expected {len(z)} values as in clusters, got {len(t)}")
        known = placed & (t != UNKNOWN_LABEL)
        n_labelled = int(known.sum())
        if n_labelled:
            h_t, information, conditional = _information(z[known], t[known])
    return ClusterReport(
        n_samples=len(z),
        n_ignored=int((~placed).sum()),
        n_clusters=len(sizes),
        sizes=tuple(sizes.tolist()),
        n_singletons=int((sizes == 1).sum()),
        entropy=entropy(sizes),
        n_labelled=n_labelled,
        label_entropy=h_t,
        mutual_information=information,
        conditional_entropy=conditional,
    )


def _information(z: IdArray, t: IdArray) -> tuple[float, float, float]:
    """H(T), I(Z;T) and H(Z|T)."""
    _, z_code, z_counts = np.unique(z, return_inverse=True, return_counts=True)
    _, t_code, t_counts = np.unique(t, return_inverse=True, return_counts=True)
    pairs = np.unique(z_code.astype(np.int64) * len(t_counts) + t_code, return_counts=True)[1]
    h_z, h_t, h_zt = entropy(z_counts), entropy(t_counts), entropy(pairs)
    # Both are at least 0; rounding may say otherwise when one variable decides the other.
    return h_t, max(0.0, h_z + h_t - h_zt), max(0.0, h_zt - h_t)


def _as_ids(values: Sequence[int] | npt.NDArray[Any] | Tensor, name: str) -> IdArray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one id per sample (1-D), got {array.ndim} dimensions")
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if len(array) and array.max() > np.iinfo(np.int64).max:  # uint64's, which would come out negative
        raise ValueError(f"{name}: expected ids of at most {np.iinfo(np.int64).max}, got {array.max()}")
    ids = array.astype(np.int64)
    if len(ids) and ids.min() < NO_CLUSTER:
        raise ValueError(f"{name}: expected ids of at least {NO_CLUSTER}, got {ids.min()}")
    return ids
