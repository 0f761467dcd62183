"""K-means on a GPU, through the public functions: against the float64 definition, cuVS and flash-kmeans.

pytest -m gpu
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kmeans_cases import METRICS, Case, arguments, check, check_update, covering_cases, every_case, hard_cases
from torch import Tensor

from wscl_fast import _ops
from wscl_fast.functional import kmeans_assign, kmeans_update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available()
        and not _ops.kmeans_serves(torch.device("cuda"), torch.float32, "kmeans_update"),
        reason="wscl_fast was built without its CUDA kernels",
    ),
]


@dataclass
class Results:
    """On the CPU, in the shapes of the core."""

    assignment: Tensor
    distance: Tensor
    sums: Tensor | None = None
    counts: Tensor | None = None
    inertia: Tensor | None = None
    bad_row: int = -1


def assign(x: Tensor, centroids: Tensor, metric: str, top: int = 1) -> Results:
    got = kmeans_assign(x.cuda(), centroids.cuda(), metric=metric, top=top, impl="fused")
    return Results(*(result.cpu().view(len(x), top) for result in got))


def update(x: Tensor, centroids: Tensor, metric: str, weights: Tensor | None = None) -> Results:
    weights = None if weights is None else weights.cuda()
    got = kmeans_update(x.cuda(), centroids.cuda(), weights=weights, metric=metric, impl="fused")
    assignment, distance, *rest = (result.cpu() for result in got)
    return Results(assignment[:, None], distance[:, None], *rest)


ON_A_GPU = [case for case in every_case() if case.arch == "90" and case.top == 1]


@pytest.mark.parametrize("case", [*covering_cases(), *ON_A_GPU], ids=str)
def test_matches_float64(case: Case) -> None:
    x, centroids = arguments(case)
    check_update(x, centroids, case.cosine, update(x, centroids, case.metric), None)


@pytest.mark.parametrize("case", list(hard_cases()), ids=str)
def test_hard_numbers(case: Case) -> None:
    x, centroids = arguments(case)
    check(x, centroids, case.cosine, assign(x, centroids, case.metric, case.top))


@pytest.mark.parametrize("metric", METRICS)
def test_many_rows(metric: str) -> None:
    """Several blocks of rows, more than the second scan has CTAs for; with weights."""
    x, centroids = torch.randn(300_000, 64), torch.randn(500, 64)
    weights = torch.rand(len(x))
    got = update(x, centroids, metric, weights)
    want = kmeans_update(x, centroids, weights=weights, metric=metric, impl="chunked")
    assert torch.equal(got.assignment[:, 0], want.assignment)
    assert got.sums is not None
    torch.testing.assert_close(got.sums, want.sums, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.counts, want.counts, rtol=1e-11, atol=0)
    torch.testing.assert_close(got.inertia, want.inertia, rtol=1e-6, atol=0)
    again = update(x, centroids, metric, weights)
    for name in ("assignment", "distance", "sums", "counts", "inertia"):
        assert torch.equal(getattr(got, name), getattr(again, name)), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    x = torch.randn(200, 40, device="cuda")
    x[171, 2] = x[17, 39] = value
    with pytest.raises(ValueError, match=r"x: expected finite numbers.* row 17"):
        kmeans_assign(x, x[:3])


def test_float64_takes_the_chunked_path() -> None:
    x = torch.randn(100, 8, dtype=torch.float64, device="cuda")
    assert kmeans_assign(x, x[:9]).assignment[:9].tolist() == list(range(9))
    with pytest.raises(RuntimeError, match="float64 on CUDA"):
        kmeans_assign(x, x[:9], impl="fused")


def test_opcheck() -> None:
    x = torch.randn(30, 5, device="cuda")
    weights = torch.rand(30, dtype=torch.float64, device="cuda")
    torch.library.opcheck(torch.ops.wscl_fast.kmeans_assign.default, (x, x[:4], False, 2, 0))
    for w in (None, weights):
        torch.library.opcheck(torch.ops.wscl_fast.kmeans_update.default, (x, x[:4], w, True, 0))


def test_a_graph_captures_the_operator() -> None:
    """Nothing in the operator waits for the device, and it runs on the current stream."""
    x, centroids = (v.cuda() for v in arguments(Case(3000, 129, 40, torch.float32, "euclidean")))
    operator = torch.ops.wscl_fast.kmeans_update
    want = operator(x, centroids, None, False, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operator(x, centroids, None, False, 0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operator(x, centroids, None, False, 0)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_memory_stays_bounded() -> None:
    """Above inputs and outputs: 64 MiB, and the centroids as the kernels see them."""
    n, k, d = 500_000, 1000, 128
    x, centroids = torch.randn(n, d, device="cuda"), torch.randn(k, d, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.wscl_fast.kmeans_update(x, centroids, None, False, 0)
    outputs = n * 12 + k * (d + 1) * 8
    assert torch.cuda.max_memory_allocated() - before - outputs < (64 << 20) + 8 * centroids.nbytes


def no_further(x: Tensor, centroids: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Another library's assignment agrees, but where it took a centroid that is a little further."""
    nearest = kmeans_assign(x, centroids, impl="fused")
    apart = (x.double() - centroids.double()[theirs.long()]).square().sum(1)
    assert (apart >= nearest.distance.double() * (1 - 1e-6)).all()
    assert (apart <= nearest.distance.double() * (1 + tolerance) + tolerance).all()
    assert (theirs == nearest.assignment).double().mean() > 0.98


def test_against_cuvs() -> None:
    kmeans = pytest.importorskip("cuvs.cluster.kmeans", reason="cuVS is not installed")
    x, centroids = (v.cuda() for v in arguments(Case(20_000, 300, 64, torch.float32, "euclidean")))
    labels, _ = kmeans.predict(kmeans.KMeansParams(n_clusters=300), x, centroids)
    no_further(x, centroids, torch.as_tensor(labels, device="cuda"), 1e-2)


def test_against_flash_kmeans() -> None:
    flash = pytest.importorskip("flash_kmeans.assign_euclid_triton", reason="flash-kmeans is not installed")
    x, centroids = (v.cuda() for v in arguments(Case(20_000, 300, 64, torch.float16, "euclidean")))
    halves = centroids.half()  # exactly what the float32 ones are
    squares = x.float().square().sum(1)
    labels = flash.euclid_assign_triton(x[None], halves[None], squares[None])[0]
    no_further(x, centroids, labels, 1e-2)
