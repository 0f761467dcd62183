"""kmeans_assign and kmeans_update against their float64 definition, on every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wscl_fast import _ops, reference
from wscl_fast.chunked import kmeans as chunked
from wscl_fast.functional import Nearest, kmeans_assign, kmeans_distances, kmeans_potentials, kmeans_update

IMPLS = ["fused", "chunked", "reference"]
METRICS = ["euclidean", "cosine"]


def problem(n: int, d: int, k: int, *, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(k, d, generator=generator, dtype=torch.float64)
    x = centroids[torch.randint(k, (n,), generator=generator)]
    x = x + 0.7 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), centroids.to(dtype)


def check_assignment(x, centroids, metric, nearest):
    """Equal to the definition, but for calls so close that float64 itself rounds them this way or that."""
    truth = reference.distances(x, centroids, cosine=metric == "cosine")
    (distance, assignment), got = truth.sort(dim=1, stable=True), nearest.assignment
    resolution = 1e-12 * distance[:, 0] + (1e-15 if metric == "cosine" else 0)
    reached = truth.gather(1, got[:, None])[:, 0]
    assert (reached <= distance[:, 0] + resolution).all()
    runner_up = distance[:, 1] if len(centroids) > 1 else torch.full_like(reached, torch.inf)
    # clear calls, and exact ties between equals, which the lowest index wins (in the cosine float64 itself
    # rounds: there only centroids that are the same are known to be equally near)
    sure = runner_up > distance[:, 0] + resolution
    if metric == "euclidean":
        sure |= reached == distance[:, 0]
    assert torch.equal(got[sure], assignment[sure, 0])
    _, kind = torch.unique(centroids, dim=0, return_inverse=True)
    assert not ((kind[:, None] == kind).tril(-1).any(dim=1))[got].any()
    dtype = nearest.distance.dtype
    wanted = reached.clamp(max=torch.finfo(dtype).max).to(dtype)
    torch.testing.assert_close(
        nearest.distance, wanted, rtol=2e-6, atol=1e-45 if metric == "euclidean" else 1e-15
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (127, 5, 3), (1000, 129, 17), (5, 40, 64), (0, 3, 4)])
def test_assign_equals_the_definition(impl, metric, dtype, n, k, d, monkeypatch):
    monkeypatch.setitem(chunked.BLOCK_ELEMENTS, "cpu", 100 * max(k, d))  # several blocks, the last short
    x, centroids = problem(n, d, k, dtype=dtype)
    nearest = kmeans_assign(x, centroids, metric=metric, impl=impl)
    assert nearest.assignment.dtype == torch.int64
    assert nearest.distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert nearest.assignment.shape == nearest.distance.shape == (n,)
    check_assignment(x, centroids, metric, nearest)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("top", [2, 5, 20])
def test_assign_top(impl, metric, top):
    if impl == "fused" and top > _ops.MOST_TOP:
        with pytest.raises(RuntimeError, match="impl='fused' serves top up to"):
            kmeans_assign(*problem(30, 4, 20), top=top, impl="fused")
        return
    x, centroids = problem(300, 12, 20)
    centroids[7] = centroids[3]  # equals among the nearest
    nearest = kmeans_assign(x, centroids, metric=metric, top=top, impl=impl)
    distance, assignment = reference.distances(x, centroids, cosine=metric == "cosine").sort(
        dim=1, stable=True
    )
    assert torch.equal(nearest.assignment, assignment[:, :top])
    torch.testing.assert_close(nearest.distance, distance[:, :top].float())


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_the_origin_keeps_its_digits(impl):
    x, _ = problem(500, 10, 8)
    x = (x * 64).round() / 64  # exactly representable after the move
    c = x[:10]
    near = kmeans_assign(x, c, impl=impl)
    far = kmeans_assign(x + 2.0**16, c + 2.0**16, impl=impl)
    assert torch.equal(near.assignment, far.assignment)
    torch.testing.assert_close(near.distance, far.distance, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_tight_cone_of_directions(impl):
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(16, dtype=torch.float64)
    axis[0] = 1000
    centroids = axis + torch.randn(6, 16, generator=generator, dtype=torch.float64)
    truth = torch.arange(6).repeat(20)
    x = centroids[truth] + 0.01 * torch.randn(120, 16, generator=generator, dtype=torch.float64)
    assert torch.equal(kmeans_assign(x.float(), centroids.float(), metric="cosine", impl=impl)[0], truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_first(impl, metric):
    c = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    assert kmeans_assign(x, c, metric=metric, impl=impl).assignment.tolist() == [0, 0, 0, 1]
    alike = torch.ones(70, 5)
    assert not kmeans_assign(alike[:9], alike, metric=metric, impl=impl).assignment.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors_in_cosine(impl):
    c = torch.randn(7, 5)
    assignment, distance = kmeans_assign(torch.zeros(2, 5), c, metric="cosine", impl=impl)
    assert assignment.tolist() == [0, 0]
    assert distance.tolist() == [1, 1]
    c[2] = 0  # a centroid without a direction is at distance 1 of everything
    x = torch.randn(50, 5)
    check_assignment(x, c, "cosine", kmeans_assign(x, c, metric="cosine", impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_stays_exact(impl):
    x, centroids = problem(300, 8, 10)
    plain = kmeans_assign(x, centroids, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kmeans_assign(x, centroids, impl=impl)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(METRICS),
    st.sampled_from([1e-20, 1e-10, 1e-3, 1.0, 1e4, 1e20]),
    st.sampled_from([0.0, 1.0, 1e4, 1e7]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape_scale_and_offset(impl, n, d, k, metric, scale, offset, duplicates, seed):
    x, centroids = problem(n, d, k, seed=seed)
    x, centroids = (x + offset) * scale, (centroids + offset) * scale
    if duplicates:
        x, centroids = x[torch.randint(n, (2 * n,))], centroids[torch.randint(k, (2 * k,))]
    check_assignment(x, centroids, metric, kmeans_assign(x, centroids, metric=metric, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_update_equals_the_definition(impl, metric, weighted, dtype):
    x, centroids = problem(700, 19, 33, dtype=dtype)
    x[5] = 0
    weights = torch.rand(700) if weighted else None
    got = kmeans_update(x, centroids, weights=weights, metric=metric, impl=impl)
    nearest = kmeans_assign(x, centroids, metric=metric, impl=impl)
    assert torch.equal(got.assignment, nearest.assignment)
    assert torch.equal(got.distance, nearest.distance)
    want = reference.kmeans_update(x, centroids, weights=weights, cosine=metric == "cosine")
    assert got.counts.dtype == (torch.float64 if weighted else torch.int64)
    assert got.sums.dtype == got.inertia.dtype == torch.float64
    assert got.inertia.ndim == 0
    # At most plain PyTorch's own error at this dtype, plus a little.
    rows = torch.nn.functional.normalize(x) if metric == "cosine" else x
    rows = rows if weights is None else rows * weights[:, None].to(dtype)
    plain = torch.zeros_like(centroids).index_add_(0, got.assignment, rows)
    bound = (plain.double() - want[2]).abs().max() + 1e-12 * (1 + want[2].abs())
    assert ((got.sums - want[2]).abs() <= bound).all()
    if metric == "euclidean":
        assert ((got.sums - want[2]).abs() <= 1e-12 * (1 + want[2].abs())).all()
    else:  # multiples of 2^-40 for each row where the kernels sum them
        grid = 2.0**-41 * want[3].double()[:, None] if dtype != torch.float64 else 0
        assert ((got.sums - want[2]).abs() <= 1e-12 * (1 + want[2].abs()) + grid).all()
    torch.testing.assert_close(got.counts, want[3], rtol=1e-12, atol=0)
    torch.testing.assert_close(got.inertia, want[4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_weight_of_no_points_is_no_count(impl):
    x, centroids = problem(1, 4, 3)
    got = kmeans_update(x[:0], centroids, weights=torch.ones(0), impl=impl)
    assert torch.equal(got.counts, torch.zeros(3, dtype=torch.float64))
    assert got.counts.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_points_without_columns_are_counted(impl, metric, weighted):
    weights = torch.tensor([1.0, 2.0, 0.5]) if weighted else None
    got = kmeans_update(torch.ones(3, 0), torch.ones(2, 0), weights=weights, metric=metric, impl=impl)
    assert got.assignment.tolist() == [0, 0, 0]
    assert got.counts.tolist() == [3.5 if weighted else 3, 0]
    assert got.sums.shape == (2, 0)
    assert float(got.inertia) == (float(got.counts[0]) if metric == "cosine" else 0)


def test_weights_are_no_break_of_a_traced_graph():
    x, centroids = problem(50, 7, 5)
    weights = torch.rand(50)
    torch._dynamo.reset()
    update = torch.compile(kmeans_update, fullgraph=True, backend="aot_eager")
    got = update(x, centroids, weights=weights, impl="fused")
    for one, other in zip(got, kmeans_update(x, centroids, weights=weights, impl="fused"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_update_twice_gives_the_same_bits(impl):
    x, centroids = problem(3000, 24, 50)
    for one, other in zip(
        kmeans_update(x, centroids, impl=impl), kmeans_update(x, centroids, impl=impl), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    x, centroids = problem(100, 12, 7)
    plain = kmeans_assign(x, centroids, impl=impl)
    wide = torch.zeros(100, 25)
    wide[:, 1::2] = x
    views = [wide[:, 1::2], x.T.contiguous().T, x[:, None].expand(-1, 1, -1)[:, 0]]
    for view in views:
        assert torch.equal(kmeans_assign(view, centroids.T.contiguous().T, impl=impl).assignment, plain[0])


@pytest.mark.parametrize("function", [kmeans_assign, kmeans_update])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(function, impl, value):
    x, centroids = problem(30, 4, 3)
    x[17, 2] = value
    with pytest.raises(ValueError, match=r"x: expected finite numbers.* row 17"):
        function(x, centroids, impl=impl)
    centroids[2, 0] = value
    with pytest.raises(ValueError, match=r"centroids: expected finite numbers.* row 2"):
        function(x[:17], centroids, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected a floating-point"),
        ({"x": torch.ones(3)}, ValueError, "x: expected a matrix"),
        ({"centroids": torch.ones(2, 3)}, ValueError, "centroids: expected 4 columns"),
        ({"centroids": torch.ones(0, 4)}, ValueError, "centroids: expected at least one"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
    ],
)
@pytest.mark.parametrize("function", [kmeans_assign, kmeans_update])
def test_bad_arguments(function, change, error, message):
    arguments = {"x": torch.ones(3, 4), "centroids": torch.ones(2, 4)} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("centroids"), **arguments)


@pytest.mark.parametrize(
    ("top", "error"), [(0, ValueError), (3, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_bad_top(top, error):
    with pytest.raises(error, match="top: expected"):
        kmeans_assign(torch.ones(3, 4), torch.ones(2, 4), top=top)


def test_top_may_be_a_number_of_numpy():
    x, centroids = problem(30, 4, 5)
    got, want = (kmeans_assign(x, centroids, top=top) for top in (np.int64(2), 2))
    assert got.assignment.equal(want.assignment)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_bad_weights(value):
    weights = torch.ones(3)
    weights[1] = value
    with pytest.raises(ValueError, match="weights: expected finite"):
        kmeans_update(torch.ones(3, 4), torch.ones(2, 4), weights=weights)
    with pytest.raises(ValueError, match="weights: expected shape"):
        kmeans_update(torch.ones(3, 4), torch.ones(2, 4), weights=torch.ones(4))


# --- the kernels: every instruction set, and candidates of either precision ---------------------------

KERNELS = [
    ("portable", "full"),
    ("avx2", "full"),
    ("avx512", "full"),
    ("avx512_bf16", "bfloat16"),
    ("amx_bf16", "bfloat16"),
]


@pytest.fixture(params=KERNELS, ids="-".join)
def candidates(request, extension):
    """Precision of the candidates, with the instruction set in use."""
    name, precision = request.param
    if name not in extension.supported_instruction_sets():
        pytest.skip(f"this processor has no {name}")
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    yield precision
    extension.use_instruction_set(before)


def assign_with(candidates, x, centroids, metric):
    nearest = _ops.kmeans_assign(x, centroids, cosine=metric == "cosine", candidates=candidates)
    return Nearest(*(result[:, 0] for result in nearest))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(700, 64, 100), (481, 129, 33), (13, 1, 1), (250, 31, 300), (0, 4, 3)]
)
def test_kernels_equal_the_definition(candidates, metric, dtype, n, d, k):
    x, centroids = problem(n, d, k, dtype=dtype)
    if dtype != torch.float64:
        centroids = centroids.float()
    cosine, weights = metric == "cosine", torch.rand(n, dtype=torch.float64)
    nearest = assign_with(candidates, x, centroids, metric)
    check_assignment(x, centroids, metric, nearest)
    got = _ops.kmeans_update(x, centroids, weights=weights, cosine=cosine, candidates=candidates)
    want = reference.kmeans_update(x, centroids, weights=weights, cosine=cosine)
    assert torch.equal(got[0], nearest[0])
    torch.testing.assert_close(got[2:4], want[2:4], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[4], want[4], rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 80),
    d=st.integers(1, 70),
    k=st.integers(1, 90),
    metric=st.sampled_from(METRICS),
    scale=st.sampled_from([1e-38, 1e-20, 1e-10, 1.0, 1e4, 1e20, 1e36]),
    offset=st.sampled_from([0.0, 1.0, 1e4, 1e7]),
    rounding=st.sampled_from([0, 1, 64]),
    seed=st.integers(0, 1000),
)
def test_kernels_at_any_shape_scale_and_offset(candidates, n, d, k, metric, scale, offset, rounding, seed):
    x, centroids = problem(n, d, k, seed=seed)
    if rounding:  # on a grid: many ties, many duplicates
        x, centroids = (x * rounding).round() / rounding, (centroids * rounding).round() / rounding
    x, centroids = (x + offset) * scale, (centroids + offset) * scale
    x, centroids = x.nan_to_num(), centroids.nan_to_num()
    check_assignment(x, centroids, metric, assign_with(candidates, x, centroids, metric))
    top = min(k, 3)
    nearest = _ops.kmeans_assign(x, centroids, cosine=metric == "cosine", top=top, candidates=candidates)
    truth = reference.distances(x, centroids, cosine=metric == "cosine")
    wanted, resolution = truth.sort(dim=1).values[:, :top], 1e-15 if metric == "cosine" else 0
    torch.testing.assert_close(truth.gather(1, nearest[0]), wanted, rtol=1e-12, atol=resolution)
    assert all(len(set(row)) == top for row in nearest[0].tolist())


@pytest.mark.parametrize("metric", METRICS)
def test_a_point_far_out_is_placed(candidates, metric):
    """So far that its product with a centroid overflows, among others that are near."""
    x, centroids = problem(100, 20, 40)
    x[50] = 3e38 * torch.sign(centroids[17])
    x[51] = 1e25 * centroids[3]
    check_assignment(x, centroids, metric, assign_with(candidates, x, centroids, metric))


@pytest.mark.parametrize("d", [1, 2, 4, 7, 12, 64, 65, 256, 260])
def test_any_number_of_columns_in_the_last_vector(candidates, d):
    """Few of them share its lanes; rows are the operand as they lie, or are written for it."""
    for k in (*range(2, 38), 97, 100, 104, 4096 + 3):
        x, centroids = problem(50, d, k, seed=k, dtype=torch.float32)
        got = assign_with(candidates, x, centroids, "euclidean")
        check_assignment(x, centroids, "euclidean", got)
        apart = torch.stack([x, x], dim=2).reshape(50, 2 * d)[:, ::2]  # read at a stride
        written = assign_with(candidates, apart, centroids, "euclidean")
        assert torch.equal(got.assignment, written.assignment)
        assert torch.equal(got.distance, written.distance)


def test_sums_of_many_clusters_take_a_second_pass(candidates):
    """More than the threads' own sums may take: each thread then owns some of the clusters."""
    x, centroids = problem(300, 600, 9000)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        got = _ops.kmeans_update(x, centroids, weights=None, cosine=False, candidates=candidates)
    finally:
        torch.set_num_threads(before)
    want = torch.zeros(9000, 600, dtype=torch.float64).index_add_(0, got[0], x.double())
    torch.testing.assert_close(got[2], want, rtol=1e-12, atol=0)
    assert torch.equal(got[3], torch.bincount(got[0], minlength=9000))


def test_more_vectors_of_columns_than_a_group_numbers(candidates):
    """The nearest of 9000 centroids: their numbers do not fit into the bits that a score spares at once."""
    x, centroids = problem(200, 12, 9000, dtype=torch.float32)
    centroids[8192 : 8192 + 60] = centroids[:60]  # equals, groups apart
    x[:60] = centroids[:60]
    for metric in METRICS:
        check_assignment(x, centroids, metric, assign_with(candidates, x, centroids, metric))


def test_many_close_calls(candidates):
    """More centroids at one distance than are told apart at once, and some that differ in the last digit."""
    x = torch.randn(40, 33)
    centroids = x[:1] + 1e-3 * torch.randn(300, 33).sign()  # all at one distance of the first point
    centroids[150:] = centroids[:150]
    centroids[77] = torch.nextafter(centroids[76], x[0])
    check_assignment(x, centroids, "euclidean", assign_with(candidates, x, centroids, "euclidean"))


def test_flushed_subnormals_lose_no_column(candidates):
    """A score of zero whose low bits hold a column's number is subnormal."""
    centroids = torch.randn(200, 16).round()
    centroids = torch.cat([centroids, -centroids, torch.zeros(1, 16)])  # their mean is zero, and one of them
    x = torch.zeros(3, 16)
    torch.set_flush_denormal(True)
    try:
        got = assign_with(candidates, x, centroids, "euclidean")
    finally:
        torch.set_flush_denormal(False)
    assert (centroids[got.assignment] == 0).all()
    check_assignment(x, centroids, "euclidean", got)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (701, 64, 100), (333, 37, 30), (0, 3, 2)])
@pytest.mark.parametrize("exponent", [-70, 0, 60])
def test_distances_equal_the_definition(candidates, metric, dtype, weighted, n, d, k, exponent):
    if dtype == torch.float16 and exponent:
        return
    x, centroids = problem(n, d, k, dtype=dtype)
    x, centroids = (x + 10) * 2.0**exponent, (centroids.to(x) + 10) * 2.0**exponent
    if dtype == torch.float16:
        centroids = centroids.float()
    if n > 1:
        x[1] = 0
    assignment = torch.randint(k, (n,))
    weights = torch.rand(n, dtype=torch.float64) if weighted else None
    truth = reference.distances(x, centroids, cosine=metric == "cosine").gather(1, assignment[:, None])[:, 0]
    total = truth.sum() if weights is None else truth @ weights
    for impl in ("fused", "chunked"):
        got = kmeans_distances(x, centroids, assignment, weights=weights, metric=metric, impl=impl)
        wanted = truth.clamp(max=torch.finfo(got.distance.dtype).max).to(got.distance.dtype)
        torch.testing.assert_close(got.distance, wanted, rtol=3e-6, atol=1e-14 * (metric == "cosine"))
        torch.testing.assert_close(got.inertia, total, rtol=3e-6, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_distances_refuse_no_centroid(impl):
    for number in (-1, 2):
        with pytest.raises(RuntimeError, match=f"assignment: expected 0 to 1, got {number}"):
            kmeans_distances(torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0, number, 1]), impl=impl)
    with pytest.raises(TypeError, match="assignment: expected int64"):
        kmeans_distances(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="assignment: expected device cpu as x, got meta"):
        kmeans_distances(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3, device="meta").long(), impl=impl)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("impl", ["fused", "chunked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_distance(impl, metric, value):
    x, centroids = problem(30, 4, 3)
    own = torch.arange(30) % 3
    for weights in (None, (torch.arange(30) != 17).float()):
        kmeans_distances(x, centroids, own, weights=weights, metric=metric, impl=impl)
        spoilt = x.clone()
        spoilt[17, 2] = value
        with pytest.raises(ValueError, match=r"x: expected finite numbers.* row 17"):
            kmeans_distances(spoilt, centroids, own, weights=weights, metric=metric, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (700, 64, 8), (333, 37, 3), (0, 3, 2)])
def test_potentials_equal_the_definition(candidates, dtype, scaled, weighted, n, d, m):
    x, _ = problem(n, d, 5, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x + 100  # where ‖x‖² − 2 x·c + ‖c‖² would lose its digits
    some = 100 + torch.randn(m, d, dtype=wide)
    nearest = torch.full((n,), float(d), dtype=wide)
    nearest[: n // 2] = torch.inf
    scale = 0.5 + torch.rand(n, dtype=wide) if scaled else None
    weights = torch.rand(n, dtype=torch.float64) if weighted else None
    points = x.double() if scale is None else x.to(wide).double() * scale.double()[:, None]
    square = (points - some.double()[:, None]).square().sum(dim=2)
    want = torch.minimum(square, nearest.double())
    for impl in ("fused", "chunked"):
        got = kmeans_potentials(x, some, nearest, scale=scale, weights=weights, impl=impl)
        tolerance = {"rtol": 1e-4 if scaled and wide == torch.float32 else 3e-6, "atol": 1e-30}
        torch.testing.assert_close(got.distance, want.to(wide), **tolerance)
        assert got.potential.dtype == torch.float64
        total = want.sum(dim=1) if weights is None else want @ weights
        torch.testing.assert_close(got.potential, total, **tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, "x: expected a matrix"),
        ({"candidates": torch.ones(2, 3)}, ValueError, "candidates: expected 4 columns"),
        ({"nearest": torch.ones(2)}, ValueError, "nearest: expected"),
        ({"nearest": torch.ones(3).double()}, TypeError, "nearest: expected torch.float32"),
        ({"scale": torch.ones(3).double()}, TypeError, "scale: expected torch.float32"),
        ({"weights": torch.ones(3)}, TypeError, "weights: expected torch.float64"),
        ({"weights": -torch.ones(3).double()}, ValueError, "weights: expected finite numbers of at least 0"),
        ({"candidates": torch.ones(2, 4, device="meta")}, ValueError, "candidates: expected device cpu as x"),
        ({"candidates": torch.ones(2, 4).half()}, TypeError, "candidates: expected torch.float32 or torch.f"),
        ({"x": torch.ones(3, 4).double()}, TypeError, "candidates: expected torch.float64 for x in torch.f"),
        ({"candidates": torch.full((2, 4), torch.nan)}, ValueError, "candidates: expected finite numbers"),
        (
            {"x": torch.full((3, 4), torch.nan), "nearest": torch.full((3,), torch.inf)},
            ValueError,
            "x: expected finite numbers",
        ),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_arguments_of_potentials(change, error, message):
    arguments = {"x": torch.ones(3, 4), "candidates": torch.ones(2, 4), "nearest": torch.ones(3)} | change
    with pytest.raises(error, match=message):
        kmeans_potentials(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(extension, dtype):
    x, centroids = problem(30, 5, 4, dtype=dtype)
    weights = torch.rand(30, dtype=torch.float64)
    torch.library.opcheck(torch.ops.wscl_fast.kmeans_assign.default, (x, centroids, False, 2, 0))
    for w in (None, weights):
        torch.library.opcheck(torch.ops.wscl_fast.kmeans_update.default, (x, centroids, w, True, 0))
        some = torch.arange(30) % 4
        torch.library.opcheck(torch.ops.wscl_fast.kmeans_distances.default, (x, centroids, some, w, True))
        for scale in (None, x[:, 0].abs()):
            arguments = (x, centroids, x[:, 0].abs(), scale, w)
            torch.library.opcheck(torch.ops.wscl_fast.kmeans_potentials.default, arguments)
