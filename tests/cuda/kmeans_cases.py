"""K-means problems, and what the CUDA kernels have to make of them: for the simulator and for a GPU.

Tests take a covering part of them; ``make simulate`` runs them all (matrix.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from wscl_fast import reference


class Outcome(Protocol):
    """What a pass returned: assignment and distance ``[N, top]``; sums and what follows of an update."""

    assignment: Tensor
    distance: Tensor
    bad_row: int
    sums: Tensor | None
    counts: Tensor | None
    inertia: Tensor | None


ARCHITECTURES = ("80", "90", "100")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("euclidean", "cosine")
POINTS = (1, 31, 128, 129, 300)
CENTROIDS = (1, 2, 63, 64, 65, 129, 300)
WIDTHS = (1, 8, 40, 64, 65, 128, 200, 256, 300, 700)


@dataclass(frozen=True)
class Case:
    """A problem. On a ``grid`` there are many ties and duplicates."""

    n: int
    k: int
    d: int
    dtype: torch.dtype
    metric: str
    scale: float = 1.0
    offset: float = 0.0
    grid: int = 0
    top: int = 1
    arch: str = "90"

    def __str__(self) -> str:
        extra = [
            f"{name}{getattr(self, name):g}"
            for name in ("scale", "offset", "grid", "top")
            if getattr(self, name) != getattr(Case, name)
        ]
        shape = f"{self.n}x{self.k}x{self.d}"
        return "-".join([f"sm{self.arch}", str(self.dtype)[6:], self.metric, shape, *extra])

    @property
    def cosine(self) -> bool:
        return self.metric == "cosine"


def every_case() -> Iterator[Case]:
    for arch, dtype, metric, (at, n), d in itertools.product(
        ARCHITECTURES, DTYPES, METRICS, enumerate(POINTS), WIDTHS
    ):
        k = CENTROIDS[(3 * at + WIDTHS.index(d)) % len(CENTROIDS)]
        yield Case(n, k, d, dtype, metric, arch=arch)
        yield Case(n, CENTROIDS[-1 - at], d, dtype, metric, grid=1, arch=arch)
    for arch, case in itertools.product(ARCHITECTURES, hard_cases(DTYPES)):
        yield replace(case, arch=arch)


def covering_cases() -> Iterator[Case]:
    for dtype, metric in itertools.product(DTYPES, METRICS):
        yield Case(300, 129, 64, dtype, metric)
        yield Case(129, 300, 200, dtype, metric)
        yield Case(70, 65, 300, dtype, metric)  # rows that stream
        yield Case(31, 2, 8, dtype, metric, grid=1)
        yield Case(1, 1, 1, dtype, metric)


def hard_cases(dtypes: Sequence[torch.dtype] = DTYPES[:1]) -> Iterator[Case]:
    for dtype, metric in itertools.product(dtypes, METRICS):
        yield Case(130, 70, 12, dtype, metric, grid=1)  # ties
        yield Case(65, 200, 64, dtype, metric, grid=2)
        for offset in (1.0, 1e4, 1e7):
            if dtype != torch.float16 or offset <= 1e4:
                yield Case(130, 70, 40, dtype, metric, offset=offset)
        for scale in (1e-38, 1e-20, 1e-10, 1e4, 1e20, 1e36):
            if dtype != torch.float16 or scale == 1e4:
                yield Case(130, 70, 40, dtype, metric, scale=scale)
        for top in (2, 5, 8):
            yield Case(130, 200, 40, dtype, metric, top=top)
        yield Case(130, 9, 6, dtype, metric, top=8, grid=1)
        yield Case(70, 8, 300, dtype, metric, top=8)


def arguments(case: Case) -> tuple[Tensor, Tensor]:
    """Points around the centroids, some of them twice."""
    torch.manual_seed(0)
    centroids = torch.randn(case.k, case.d, dtype=torch.float64)
    x = centroids[torch.randint(case.k, (case.n,))] + 0.7 * torch.randn(case.n, case.d, dtype=torch.float64)
    if case.grid:
        x, centroids = ((v * case.grid).round() / case.grid for v in (x, centroids))
        x[case.n // 2 :] = x[: case.n - case.n // 2].clone()
        centroids[case.k // 2 :] = centroids[: case.k - case.k // 2].clone()
    x, centroids = ((v + case.offset) * case.scale for v in (x, centroids))
    # as the public function passes centroids on: float32, whatever the points are
    return x.to(case.dtype).nan_to_num(), centroids.to(case.dtype).float().nan_to_num()


def check(x: Tensor, centroids: Tensor, cosine: bool, got: Outcome) -> None:
    """Equal to the definition, but for calls so close that float64 itself rounds them this way or that."""
    top = got.assignment.shape[1]
    truth = reference.distances(x, centroids, cosine=cosine)
    distance, assignment = truth.sort(dim=1, stable=True)
    reached = truth.gather(1, got.assignment)
    resolution = 1e-12 * distance[:, :top] + (1e-15 if cosine else 0)
    assert (reached <= distance[:, :top] + resolution).all()
    assert all(len(set(row)) == top for row in got.assignment.tolist())
    runner_up = torch.nn.functional.pad(distance, (0, 1), value=torch.inf)[:, 1 : top + 1]
    before = torch.nn.functional.pad(distance, (1, 0), value=-torch.inf)[:, :top]
    clear = (runner_up > distance[:, :top] + resolution) & (before < distance[:, :top] - resolution)
    exact_tie = (reached == distance[:, :top]) & (torch.arange(top) == 0)
    if cosine:  # centroids of one direction and several lengths tie but for the rounding of their norms
        exact_tie &= (centroids[got.assignment] == centroids[assignment[:, :top]]).all(2)
    sure = clear | exact_tie
    assert torch.equal(got.assignment[sure], assignment[:, :top][sure])
    wanted = reached.clamp(max=torch.finfo(torch.float32).max).float()
    torch.testing.assert_close(got.distance, wanted, rtol=2e-6, atol=1e-15 if cosine else 1e-45)
    assert got.bad_row == -1


def check_update(x: Tensor, centroids: Tensor, cosine: bool, got: Outcome, weights: Tensor | None) -> None:
    check(x, centroids, cosine, got)
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    points = reference._unit(x.double()) if cosine else x.double()
    member = torch.nn.functional.one_hot(got.assignment[:, 0], len(centroids)).T.double() * share
    assert got.sums is not None
    assert got.counts is not None
    assert got.inertia is not None
    size = member @ points.abs()
    assert ((got.sums - member @ points).abs() <= 1e-12 * size).all()
    torch.testing.assert_close(got.counts.double(), member.sum(1), rtol=1e-12, atol=0)
    assert got.counts.dtype == (torch.int64 if weights is None else torch.float64)
    distance = reference.distances(x, centroids, cosine=cosine).gather(1, got.assignment)[:, 0]
    torch.testing.assert_close(got.inertia, (share * distance).sum(), rtol=1e-6, atol=1e-15 * len(x))
