"""The CUDA core's k-means, run in the simulator, against the float64 definition.

Assignments have to be the definition's, whatever the dtype. ``WSCL_SIMULATE=all`` (``make simulate``) runs
the whole matrix instead of a covering part.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from simulated_kmeans import Results, run
from simulator import ptxsim
from torch import Tensor

from wscl_fast import reference

pytestmark = pytest.mark.simulated

EVERYTHING = os.environ.get("WSCL_SIMULATE") == "all"
ARCHITECTURES = ("80", "90", "100") if EVERYTHING else ("90",)
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


def covering_cases() -> Iterator[Case]:
    for dtype, metric in itertools.product(DTYPES, METRICS):
        yield Case(300, 129, 64, dtype, metric)
        yield Case(129, 300, 200, dtype, metric)
        yield Case(70, 65, 300, dtype, metric)  # rows that stream
        yield Case(31, 2, 8, dtype, metric, grid=1)
        yield Case(1, 1, 1, dtype, metric)


def hard_cases() -> Iterator[Case]:
    for dtype, metric in itertools.product(DTYPES if EVERYTHING else DTYPES[:1], METRICS):
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


def check(x: Tensor, centroids: Tensor, cosine: bool, got: Results) -> None:
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
    sure = clear | exact_tie
    assert torch.equal(got.assignment[sure], assignment[:, :top][sure])
    wanted = reached.clamp(max=torch.finfo(torch.float32).max).float()
    torch.testing.assert_close(got.distance, wanted, rtol=2e-6, atol=1e-15 if cosine else 1e-45)
    assert got.bad_row == -1


def check_update(x: Tensor, centroids: Tensor, cosine: bool, got: Results, weights: Tensor | None) -> None:
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


@pytest.mark.parametrize("case", list(every_case() if EVERYTHING else covering_cases()), ids=str)
def test_matches_float64(case: Case) -> None:
    x, centroids = arguments(case)
    got = run(x, centroids, cosine=case.cosine, update=True, arch=case.arch)
    check_update(x, centroids, case.cosine, got, None)


@pytest.mark.parametrize("case", list(hard_cases()), ids=str)
def test_hard_numbers(case: Case) -> None:
    x, centroids = arguments(case)
    check(x, centroids, case.cosine, run(x, centroids, cosine=case.cosine, top=case.top, arch=case.arch))


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_first(metric: str) -> None:
    cosine = metric == "cosine"
    c = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    assert run(x, c, cosine=cosine).assignment[:, 0].tolist() == [0, 0, 0, 1]
    alike = torch.ones(130, 5)
    assert not run(alike, alike, cosine=cosine).assignment.any()


def test_far_from_the_origin_keeps_its_digits() -> None:
    torch.manual_seed(0)
    x = (torch.randn(200, 20) * 64).round() / 64  # exactly representable after the move
    near, far = run(x, x[:70]), run(x + 2.0**16, x[:70] + 2.0**16)
    assert torch.equal(near.assignment, far.assignment)
    assert torch.equal(near.distance, far.distance)


def test_tight_groups_far_apart() -> None:
    """Closer to each other than the candidates' product can tell: float64 decides nearly everything."""
    torch.manual_seed(0)
    group = 1e4 * torch.randn(3, 1, 16)
    centroids = (group + 0.1 * torch.randn(3, 30, 16)).reshape(90, 16)
    x = centroids[torch.randint(90, (140,))] + 0.01 * torch.randn(140, 16)
    check(x, centroids, False, run(x, centroids))


@pytest.mark.parametrize("metric", METRICS)
def test_points_far_out_are_placed(metric: str) -> None:
    torch.manual_seed(0)
    centroids = torch.randn(40, 20)
    x = centroids[torch.randint(40, (100,))] + torch.randn(100, 20)
    x[50] = 3e38 * torch.sign(centroids[17])
    x[51] = 1e25 * centroids[3]
    x[52] = 1e-30 * centroids[4]
    check(x, centroids, metric == "cosine", run(x, centroids, cosine=metric == "cosine"))
    centroids[5], centroids[6] = 3e38, -3e38
    check(x, centroids, metric == "cosine", run(x, centroids, cosine=metric == "cosine"))


@pytest.mark.parametrize("top", [1, 3])
def test_vectors_without_a_direction(top: int) -> None:
    torch.manual_seed(0)
    x, centroids = torch.randn(50, 5), torch.randn(70, 5)
    x[3] = centroids[2] = centroids[40] = 0
    got = run(x, centroids, cosine=True, top=top)
    assert got.assignment[3].tolist() == list(range(top))
    assert got.distance[3].tolist() == [1.0] * top
    check(x, centroids, True, got)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(value: float, update: bool) -> None:
    torch.manual_seed(0)
    x, centroids = torch.randn(200, 40), torch.randn(3, 40)
    x[171, 2] = x[17, 39] = value
    got = run(x, centroids, update=update, block_rows=50)
    assert got.bad_row == 17
    assert ((got.assignment >= 0) & (got.assignment < 3)).all()


def test_no_rows() -> None:
    x, centroids = torch.empty(0, 8), torch.randn(5, 8)
    got = run(x, centroids, update=True)
    assert got.assignment.shape == (0, 1)
    assert got.sums is not None
    assert not got.sums.any()
    assert got.counts is not None
    assert got.counts.tolist() == [0] * 5
    assert got.inertia == 0
    assert got.bad_row == -1


def test_no_columns() -> None:
    got = run(torch.empty(5, 0), torch.empty(3, 0), update=True)
    assert not got.assignment.any()
    assert not got.distance.any()
    assert got.counts is not None
    assert got.counts.tolist() == [5, 0, 0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1000, 3, 20), (400, 300, 129), (2500, 40, 8)], ids=["few", "wide", "many"]
)
def test_sums_with_weights(n: int, k: int, d: int, metric: str) -> None:
    """Clusters of several chunks, sorts of two passes, more columns than a CTA has threads."""
    x, centroids = arguments(Case(n, k, d, torch.float32, metric))
    weights = torch.rand(n)
    got = run(x, centroids, cosine=metric == "cosine", update=True, weights=weights, spare_columns=3)
    check_update(x, centroids, metric == "cosine", got, weights)


def test_blocks_of_rows_come_to_the_same() -> None:
    x, centroids = arguments(Case(700, 65, 40, torch.bfloat16, "euclidean"))
    whole, blocks = (run(x, centroids, update=True, block_rows=rows) for rows in (0, 150))
    assert blocks.workspace_bytes < whole.workspace_bytes
    assert torch.equal(whole.assignment, blocks.assignment)
    assert torch.equal(whole.distance, blocks.distance)
    check_update(x, centroids, False, blocks, None)
    top = run(x, centroids, top=4, block_rows=150)
    assert torch.equal(top.assignment[:, :1], whole.assignment)


def test_many_centroids() -> None:
    """Columns in many parts, and three passes of the sort."""
    torch.manual_seed(0)
    centroids = torch.randn(66_000, 8)
    x = centroids[torch.randint(66_000, (40,))] + 0.1 * torch.randn(40, 8)
    got = run(x, centroids, update=True)
    distance = (x.double()[:, None] - centroids.double()).square().sum(2)
    assert torch.equal(got.assignment[:, 0], distance.argmin(1))
    assert got.counts is not None
    assert torch.equal(got.counts, torch.bincount(got.assignment[:, 0], minlength=66_000))


def test_same_bits_whatever_the_schedule() -> None:
    """Warps take their turns in another order: lists are filled in another order, results stay."""
    sim = ptxsim()
    x, centroids = arguments(Case(300, 129, 40, torch.float32, "euclidean", grid=2))
    weights = torch.rand(300)
    results = []
    try:
        for seed in (0, 1, 2):
            sim.set_option("SEED", seed)
            results.append(run(x, centroids, update=True, weights=weights))
    finally:
        sim.set_option("SEED", 0)
    for other in results[1:]:
        for name in ("assignment", "distance", "sums", "counts", "inertia"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


@pytest.mark.skipif(not EVERYTHING, reason="make simulate: many rows")
def test_more_undecided_rows_than_the_second_scan_has_ctas_for() -> None:
    torch.manual_seed(0)
    centroids = torch.randn(3, 8)
    centroids[1] = centroids[0]
    x = centroids[:1] + 0.1 * torch.randn(34_500, 8)
    check(x, centroids, False, run(x, centroids))
