"""The k-means that users would pick instead, each in a process with the settings it is fastest with.

Run by :class:`benchmarks.elsewhere.Elsewhere`: ``python -m benchmarks.peers_kmeans PEER TASK CASE THREADS``.
Tasks: "iteration" (assign and update once), "fit" (a number of iterations from given centroids), "seeding"
(k-means++). The data are made anew in each process, from one seed.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIT_ITERATIONS = 25

# The OpenBLAS of scikit-learn chooses best by itself; the older one in faiss takes new processors for old.
_UNSET: dict[str, str | None] = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}


@dataclass(frozen=True)
class Case:
    """N samples of d dimensions around K middles, and K centroids one iteration away from samples of them."""

    name: str
    n: int
    d: int
    k: int
    spread: float = 1.0  # of the middles, in units of the samples' own around them

    def samples(self) -> Tensor:
        """float32 [n, d]."""
        generator = torch.Generator().manual_seed(0)
        middles = self.spread * torch.randn(self.k, self.d, generator=generator)
        x = torch.randn(self.n, self.d, generator=generator)
        for start in range(0, self.n, 1 << 16):
            part = x[start : start + (1 << 16)]
            part += middles[torch.randint(self.k, (len(part),), generator=generator)]
        return x

    def start(self, x: Tensor) -> Tensor:
        """Samples, float32 [k, d]: where a fit begins."""
        return x[torch.randperm(self.n, generator=torch.Generator().manual_seed(1))[: self.k]].clone()

    def centroids(self, x: Tensor) -> Tensor:
        """Those one iteration away from the start, float32 [k, d]: where a single iteration begins.

        Peers that are timed by the difference of two fits come by there as well.
        """
        from wscl_fast.functional import kmeans_update

        first = kmeans_update(x, self.start(x))
        return (first.sums / first.counts[:, None].clamp(min=1)).float()


CASES = {
    case.name: case
    for case in (Case("A", 200_000, 128, 1000), Case("B", 60_000, 64, 100), Case("C", 100_000, 256, 4096))
}


def environment(peer: str, threads: int) -> dict[str, str | None]:
    """The peer's best setting."""
    cpuinfo = Path("/proc/cpuinfo")
    wide = cpuinfo.exists() and "avx512f" in cpuinfo.read_text()
    core = {"OPENBLAS_CORETYPE": "SkylakeX"} if peer == "faiss" and wide else {}
    return {**_UNSET, **core, "OMP_NUM_THREADS": str(threads)}


Side = Callable[[], tuple[float, float]]  # seconds and, of a fit, inertia


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def inertia(x: Tensor, centroids: Any) -> float:
    """Of the nearest centroids, taken from the differences: the same measure for everybody."""
    from wscl_fast.functional import kmeans_assign

    return float(kmeans_assign(x, torch.as_tensor(centroids, dtype=torch.float32)).distance.double().sum())


def scikit_learn(task: str, case: Case, threads: int) -> Side:
    cluster, x = importlib.import_module("sklearn.cluster"), case.samples()
    points, centroids = x.numpy(), case.start(x).numpy()
    if task == "seeding":
        return lambda: (timed(lambda: cluster.kmeans_plusplus(points, case.k, random_state=0))[0], 0.0)
    if task == "fit":
        model = cluster.KMeans(case.k, init=centroids, n_init=1, max_iter=FIT_ITERATIONS, tol=0)

        def fit() -> tuple[float, float]:
            seconds, fitted = timed(lambda: model.fit(points))
            return seconds, inertia(x, fitted.cluster_centers_)

        return fit
    # Its inner loop alone: the estimator copies and centres the samples first.
    centroids = case.centroids(x).numpy()
    numpy = importlib.import_module("numpy")
    step = importlib.import_module("sklearn.cluster._k_means_lloyd").lloyd_iter_chunked_dense
    limits = importlib.import_module("threadpoolctl").threadpool_limits
    ones, labels = numpy.ones(case.n, numpy.float32), numpy.zeros(case.n, numpy.int32)
    new, weight, shift = (numpy.zeros_like(part) for part in (centroids, centroids[:, 0], centroids[:, 0]))

    def iteration() -> tuple[float, float]:
        with limits(limits=1, user_api="blas"):  # as the estimator has it: threads take chunks
            return timed(lambda: step(points, ones, centroids, new, weight, labels, shift, threads))[0], 0.0

    return iteration


def scikit_learn_intelex(task: str, case: Case, threads: int) -> Side:
    cluster, x = importlib.import_module("sklearnex.cluster"), case.samples()
    points, centroids = x.numpy(), case.start(x).numpy()

    def fit(n_iter: int) -> tuple[float, Any]:
        return timed(
            lambda: cluster.KMeans(case.k, init=centroids, n_init=1, max_iter=n_iter, tol=0).fit(points)
        )

    if task == "fit":

        def whole() -> tuple[float, float]:
            seconds, fitted = fit(FIT_ITERATIONS)
            return seconds, inertia(x, fitted.cluster_centers_)

        return whole
    return lambda: ((fit(3)[0] - fit(1)[0]) / 2, 0.0)


def faiss(task: str, case: Case, threads: int) -> Side:
    library, x = importlib.import_module("faiss"), case.samples()
    library.omp_set_num_threads(threads)
    points, centroids = x.numpy(), case.start(x).numpy()

    def train(n_iter: int) -> Any:
        # Left to itself it takes 256 samples a centroid and leaves out the others.
        model = library.Kmeans(
            case.d, case.k, niter=n_iter, max_points_per_centroid=case.n, min_points_per_centroid=1
        )
        model.train(points, init_centroids=centroids)
        return model

    if task == "fit":

        def whole() -> tuple[float, float]:
            seconds, fitted = timed(lambda: train(FIT_ITERATIONS))
            return seconds, inertia(x, fitted.centroids)

        return whole

    def iteration() -> tuple[float, float]:
        first, second = (float(stats["time"]) for stats in train(2).iteration_stats)
        return second - first, 0.0  # without what is done once a fit

    return iteration


def fast_pytorch_kmeans(task: str, case: Case, threads: int) -> Side:
    """An iteration alone: it makes an N × K matrix of ones and zeros in each, which takes seconds."""
    library, x = importlib.import_module("fast_pytorch_kmeans"), case.samples()
    centroids = case.centroids(x)
    torch.set_num_threads(threads)

    def iteration() -> tuple[float, float]:
        model = library.KMeans(case.k, max_iter=1, tol=0)
        return timed(lambda: model.fit_predict(x, centroids))[0], 0.0

    return iteration


PEERS: dict[str, Callable[[str, Case, int], Side]] = {
    "scikit-learn": scikit_learn,
    "faiss": faiss,
    "scikit-learn-intelex": scikit_learn_intelex,
    "fast_pytorch_kmeans": fast_pytorch_kmeans,
}
PEERS_OF = {  # a task
    "iteration": tuple(PEERS),
    "fit": ("scikit-learn", "faiss", "scikit-learn-intelex"),
    "seeding": ("scikit-learn",),
}


def main() -> None:
    peer, task, case, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    try:
        side = PEERS[peer](task, CASES[case], int(threads))
    except ImportError as error:
        print("missing", error, flush=True)
        return
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds, value = side()
        print(seconds, value, flush=True)


if __name__ == "__main__":
    main()
