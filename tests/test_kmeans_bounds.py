"""kmeans_update_bounded: passes that skip work find what full passes find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wscl_fast import reference
from wscl_fast.chunked import kmeans as chunked
from wscl_fast.functional import BoundedUpdate, kmeans_update, kmeans_update_bounded

IMPLS = ["fused", "chunked"]
METRICS = ["euclidean", "cosine"]


class Passes:
    """Lloyd's iteration by bounded passes, each held to a full one."""

    def __init__(self, x, centroids, metric, impl, weights=None, half=False):
        self.x, self.centroids, self.metric, self.impl, self.weights = x, centroids, metric, impl, weights
        self.half = half
        self.previous = None
        self.assignment = torch.full((len(x),), -1)
        self.dtype = torch.float64 if torch.float64 in (x.dtype, centroids.dtype) else torch.float32
        self.distance = torch.empty(len(x), dtype=self.dtype)
        self.lower = torch.empty(len(x), dtype=self.dtype)
        self.sums = torch.zeros(centroids.shape, dtype=torch.float64)

    def step(self) -> BoundedUpdate:
        x, c, cosine = self.x, self.centroids, self.metric == "cosine"
        half = None
        if self.half and len(c) > 1:
            apart = reference.distances(c, c, cosine=cosine).fill_diagonal_(torch.inf).amin(dim=1)
            half = ((2 * apart if cosine else apart).sqrt() * (0.5 - 1e-6)).to(self.dtype)
        found = kmeans_update_bounded(
            x,
            c,
            self.assignment,
            self.distance,
            self.lower,
            self.sums,
            previous=self.previous,
            half=half,
            weights=self.weights,
            metric=self.metric,
            impl=self.impl,
        )
        full = kmeans_update(x, c, weights=self.weights, metric=self.metric, impl=self.impl)
        assert torch.equal(self.assignment, full.assignment)
        torch.testing.assert_close(self.distance, full.distance, rtol=2e-6, atol=1e-15)
        torch.testing.assert_close(found.counts, full.counts, rtol=1e-12, atol=0)
        largest = 1.0 if cosine or not len(x) else float(x.double().abs().max())  # sums are of unit vectors
        scale = largest * max(len(x), 1)
        torch.testing.assert_close(self.sums, full.sums, rtol=1e-9, atol=1e-13 * scale)
        torch.testing.assert_close(found.inertia, full.inertia, rtol=1e-6, atol=1e-15)
        truth = reference.distances(x, c, cosine=cosine)
        truth.scatter_(1, self.assignment[:, None], torch.inf)
        others = (2 * truth if cosine else truth).amin(dim=1).sqrt()
        assert (self.lower.double() <= others).all()
        mean = self.sums / found.counts.clamp(min=1e-300)[:, None]
        usable = (found.counts > 0)[:, None] & (self.sums != 0).any(dim=1, keepdim=True)
        self.previous, self.centroids = c, mean.where(usable, c.double()).to(c.dtype)
        return found


def problem(n, d, k, *, seed=0, dtype=torch.float32, noise=0.7):
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(k, d, generator=generator, dtype=torch.float64)
    x = middles[torch.randint(k, (n,), generator=generator)]
    x = x + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    start = middles + 0.3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), start.to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (0, 3, 4), (127, 5, 3), (3000, 200, 33)])
def test_every_pass_finds_what_a_full_one_finds(impl, metric, dtype, n, k, d, monkeypatch):
    monkeypatch.setitem(chunked.BLOCK_ELEMENTS, "cpu", 100 * max(k, d))  # several blocks, the last short
    x, start = problem(n, d, k, dtype=dtype)
    passes = Passes(x, start, metric, impl)
    found = [passes.step() for _ in range(8)]
    assert found[0].changed == found[0].searched == n
    if n > 1000:
        assert found[-1].searched < n / 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
def test_weights_and_half_distances(impl, metric):
    x, start = problem(2000, 8, 40, noise=0.2)
    weights = torch.rand(2000, dtype=torch.float64).where(torch.arange(2000) % 7 > 0, 0)
    passes = Passes(x, start, metric, impl, weights=weights, half=True)
    found = [passes.step() for _ in range(6)]
    assert sum(one.by_half for one in found) > 0
    assert found[0].counts.dtype == torch.float64


@pytest.mark.parametrize("metric", METRICS)
def test_many_centroids(metric):
    """More than the low bits of a score can number: several groups of columns."""
    x, start = problem(6000, 5, 4500, noise=0.05)
    passes = Passes(x, start, metric, "fused")
    found = [passes.step() for _ in range(5)]
    assert found[-1].searched < 3000


def test_a_few_centroids_that_move_far_do_not_make_a_full_search():
    """They meet every point; the bounds of the others hold."""
    x, _ = problem(8000, 32, 256, noise=0.3)
    passes = Passes(x, problem(8000, 32, 256, noise=0.3)[1], "euclidean", "fused")
    for _ in range(12):
        passes.step()
    passes.centroids = passes.centroids.clone()
    passes.centroids[:5] += 3
    assert passes.step().searched < 4000


@settings(max_examples=120, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(1, 90)),
    st.integers(0, 1000),
    st.sampled_from(METRICS),
    st.sampled_from([-67, 0, 67]),  # 1e-20, 1e20
    st.sampled_from([0.0, 300.0, 1e5]),
    st.booleans(),
    st.sampled_from(IMPLS),
)
def test_scales_offsets_and_duplicates(shape, seed, metric, exponent, offset, duplicates, impl):
    n, d, k = shape
    x, start = problem(n, d, k, seed=seed)
    if duplicates:
        x, start = x.round(), start.round()
    passes = Passes((x + offset) * 2.0**exponent, (start + offset) * 2.0**exponent, metric, impl)
    for _ in range(4):
        passes.step()


def test_centroids_that_stand_still_do_not_hide_points_that_moved():
    """The bounds of an earlier fit: loosened, with distances that nobody knows."""
    x, start = problem(3000, 16, 60)
    passes = Passes(x, start, "euclidean", "fused")
    for _ in range(12):
        passes.step()
    passes.centroids = passes.previous.clone()
    assert passes.step().searched < 1000
    generator = torch.Generator().manual_seed(1)
    moved = 0.5 * torch.randn(x.shape, generator=generator)
    passes.x = x + moved
    passes.sums.zero_().index_add_(0, passes.assignment, passes.x.double())
    passes.lower -= 1.001 * moved.norm(dim=1)
    passes.distance.fill_(torch.nan)
    for stirred in (0, 3):
        passes.centroids = passes.previous.clone()
        passes.centroids[:stirred] += 0.1
        assert passes.step().changed > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_points_of_centroids_that_stand_still_are_not_read(metric, weighted, dtype):
    """Their distances are those of the last pass, bit for bit, and a few that moved are met alone."""
    x, start = problem(9000, 32, 200, noise=0.4, dtype=dtype)
    weights = torch.rand(len(x), dtype=torch.float64) if weighted else None
    passes = Passes(x, start, metric, "fused", weights=weights)
    for _ in range(15):
        passes.step()
    passes.distance *= 1 + 2.0**-21  # read again, they would be others
    distance = passes.distance.clone()
    passes.centroids = passes.previous.clone()
    passes.centroids[7] += 1e-3
    passes.step()
    others = passes.assignment != 7
    assert torch.equal(passes.distance[others], distance[others])
    assert not torch.equal(passes.distance, distance)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_in_every_run(threads):
    x, start = problem(9000, 24, 70)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            passes = Passes(x, start, "euclidean", "fused")
            inertias = [float(passes.step().inertia) for _ in range(4)]
            runs.append((inertias, passes.sums, passes.lower))
    finally:
        torch.set_num_threads(before)
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_is_told(impl):
    x, start = problem(300, 4, 6)
    passes = Passes(x, start, "euclidean", impl)
    passes.step()
    x[211, 2] = passes.distance[211] = torch.nan  # a point that moved: its distance is not known
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN or infinity in row 211"):
        kmeans_update_bounded(
            x, start, passes.assignment, passes.distance, passes.lower, passes.sums, previous=start, impl=impl
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"assignment": torch.zeros(3)}, TypeError, "assignment: expected int64"),
        ({"assignment": torch.zeros(2).long()}, ValueError, "assignment: expected shape"),
        ({"assignment": torch.zeros(6).long()[::2]}, ValueError, "assignment: expected a contiguous"),
        ({"distance": torch.zeros(3).double()}, TypeError, "distance: expected torch.float32"),
        ({"lower": torch.zeros(3).double()}, TypeError, "lower: expected torch.float32"),
        ({"sums": torch.zeros(2, 4)}, TypeError, "sums: expected torch.float64"),
        ({"sums": torch.zeros(3, 4).double()}, ValueError, r"sums: expected shape \(2, 4\)"),
        ({"sums": None}, TypeError, "sums: expected a tensor, got NoneType"),
        ({"sums": np.zeros((2, 4))}, TypeError, "sums: expected a tensor, got ndarray"),
        ({"sums": torch.zeros(2, 4, device="meta").double()}, ValueError, "sums: expected device cpu as x"),
        ({"previous": [[1.0]]}, TypeError, "previous: expected a tensor, got list"),
        ({"previous": torch.zeros(3, 4)}, ValueError, r"previous: expected shape \(2, 4\)"),
        ({"half": torch.zeros(3)}, ValueError, "half: expected shape"),
        ({"weights": torch.zeros(2)}, ValueError, "weights: expected shape"),
        ({"weights": -torch.ones(3)}, ValueError, "weights: expected finite numbers of at least 0"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "x": torch.ones(3, 4),
        "centroids": torch.ones(2, 4),
        "assignment": torch.zeros(3).long(),
        "distance": torch.zeros(3),
        "lower": torch.zeros(3),
        "sums": torch.zeros(2, 4).double(),
    } | change
    with pytest.raises(error, match=message):
        kmeans_update_bounded(**arguments)


def test_an_assignment_out_of_range_is_refused():
    x, start = problem(5, 4, 3)
    with pytest.raises(RuntimeError, match="assignment: expected 0 to 2, got 7"):
        kmeans_update_bounded(
            x,
            start,
            torch.full((5,), 7),
            torch.zeros(5),
            torch.zeros(5),
            torch.zeros(3, 4).double(),
            previous=start,
            impl="fused",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(extension, dtype):
    x, start = problem(30, 5, 4, dtype=dtype)
    distance, lower = torch.zeros(2, 30, dtype=dtype)
    sums = torch.zeros(4, 5, dtype=torch.float64)
    none = torch.full((30,), -1)
    weights = torch.rand(30, dtype=torch.float64)
    operator = torch.ops.wscl_fast.kmeans_update_bounded.default
    torch.library.opcheck(operator, (x, start, none, distance, lower, sums, None, None, None, False, 0))
    some, half = torch.arange(30) % 4, torch.zeros(4, dtype=dtype)
    torch.library.opcheck(operator, (x, start, some, distance, lower, sums, start, half, weights, True, 0))
