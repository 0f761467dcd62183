"""Which new cluster is which old one: names that stay while clusterings come and go."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wscl_fast.clustering.base import check_count
from wscl_fast.functional._checks import check_bool

_EXACT = 1024  # clusters up to which the matching is optimal: its time grows with their cube


def match_clusters(old: Tensor, new: Tensor, n_clusters: int, *, exact: bool | None = None) -> Tensor:
    """The id that each new cluster should carry so that as many samples as can be keep theirs.

    Equals, with `overlap[i, j]` the number of samples in new cluster i and old cluster j,
    `scipy.optimize.linear_sum_assignment(overlap, maximize=True)[1]`. Beyond 1024 clusters the pairs are
    taken greedily, largest overlap first, which keeps at least half of what the optimum would.

    Args:
        old: the ids so far, int64 [n]; −1 where a sample had none.
        new: the ids to be renamed, int64 [n].
        n_clusters: K of both.
        exact: force or forbid the optimum.

    Returns:
        int64 [K], a permutation: `renamed = names[new]`.

    Raises:
        TypeError: ids that are not tensors of integers; `n_clusters` or `exact` of another type.
        ValueError: different lengths or devices, ids beyond `n_clusters`, or `n_clusters` below 1.
    """
    n_clusters = check_count(n_clusters, "n_clusters")
    if exact is not None:
        check_bool("exact", exact)
    for name, ids in (("old", old), ("new", new)):
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(ids).__name__}")
    if old.shape != new.shape or old.ndim != 1:
        raise ValueError(f"new: expected shape {tuple(old.shape)} as old, got {tuple(new.shape)}")
    if old.device != new.device:
        raise ValueError(f"new: expected device {old.device} as old, got {new.device}")
    for name, ids in (("old", old), ("new", new)):
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {ids.dtype}")
        if len(ids) and int(ids.max()) >= n_clusters:
            raise ValueError(f"{name}: expected ids below n_clusters = {n_clusters}, got {int(ids.max())}")
    both = (old >= 0) & (new >= 0)
    pairs, counts = torch.unique(new[both] * n_clusters + old[both], return_counts=True)
    pairs, counts = pairs.cpu().numpy(), counts.cpu().numpy()
    rows, columns = pairs // n_clusters, pairs % n_clusters
    if exact if exact is not None else n_clusters <= _EXACT:
        overlap = np.zeros((n_clusters, n_clusters))
        overlap[rows, columns] = counts
        names = assignment_of_least_cost(-overlap)
    else:
        names = _greedy(rows, columns, counts, n_clusters)
    return torch.from_numpy(names).to(new.device)


def assignment_of_least_cost(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The permutation p that makes `cost[i, p[i]]` least in sum, int64 [K].

    Source: the shortest augmenting paths of Jonker & Volgenant, Computing 38 (1987), one row of the
    matrix a step.
    """
    n = len(cost)
    row_of = np.full(n, -1)  # of each column
    column_of = np.full(n, -1)  # of each row
    u, v = cost.min(axis=1, initial=np.inf), np.zeros(n)
    for i, j in enumerate(cost.argmin(axis=1)):  # rows whose best column is still free
        if row_of[j] < 0:
            row_of[j], column_of[i] = i, j
    for start in np.flatnonzero(column_of < 0).tolist():
        shortest = np.full(n, np.inf)
        before = np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        i, length, path = start, 0.0, []
        while True:
            path.append(i)
            through = length + cost[i] - u[i] - v
            closer = ~done & (through < shortest)
            shortest[closer], before[closer] = through[closer], i
            j = int(np.where(done, np.inf, shortest).argmin())
            length = shortest[j]
            if row_of[j] < 0:
                break
            done[j] = True
            i = int(row_of[j])
        u[start] += length
        inner = np.array(path[1:], dtype=np.int64)
        u[inner] += length - shortest[column_of[inner]]
        v[done] -= length - shortest[done]
        while True:  # flip the path
            i = before[j]
            row_of[j] = i
            column_of[i], j = j, column_of[i]
            if i == start:
                break
    return column_of.astype(np.int64)


def _greedy(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.int64]:
    names = np.full(n, -1)
    taken = np.zeros(n, dtype=bool)
    for pair in np.argsort(-counts, kind="stable"):
        i, j = rows[pair], columns[pair]
        if names[i] < 0 and not taken[j]:
            names[i], taken[j] = j, True
    names[names < 0] = np.flatnonzero(~taken)
    return names.astype(np.int64)
