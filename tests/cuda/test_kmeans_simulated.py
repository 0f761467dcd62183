"""The CUDA core's k-means, run in the simulator, against the float64 definition.

Assignments have to be the definition's, whatever the dtype.
"""

from __future__ import annotations

import os

import pytest
import torch
from kmeans_cases import (
    METRICS,
    Case,
    arguments,
    check,
    check_update,
    covering_cases,
    hard_cases,
)
from simulated_kmeans import run
from simulator import ptxsim

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("case", list(covering_cases()), ids=str)
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


@pytest.mark.skipif(os.environ.get("WSCL_SIMULATE") != "all", reason="make simulate: many rows")
def test_more_undecided_rows_than_the_second_scan_has_ctas_for() -> None:
    torch.manual_seed(0)
    centroids = torch.randn(3, 8)
    centroids[1] = centroids[0]
    x = centroids[:1] + 0.1 * torch.randn(34_500, 8)
    check(x, centroids, False, run(x, centroids))
