"""What the benchmarks do beside timing: sides are what they are called, and what is missing is told of."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_infonce,
    bench_kmeans,
    bench_memory,
    bench_ring,
    peers,
    peers_infonce,
    peers_kmeans,
    stages,
)
from benchmarks.harness import Timing, interleave
from benchmarks.peers_infonce import Case


def called_once(sides: dict[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
    """In place of the timing."""
    return {name: (side(), Timing((1.0,), (1.0,)))[1] for name, side in sides.items()}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Those that torch.compile makes, which are run as they are: no compiler is needed."""
    made: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


def test_every_case_is_compiled(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_infonce, "interleave", called_once)
    for m in (64, 128, 256, 512):
        before = len(graphs)
        rows = peers_infonce.bench_case(Case(32, m, 8, rivals=("naive", "compiled naive")), 1)
        assert len(graphs) == before + 3  # no gradient, that of the queries, both
        assert {row["loss"] for row in rows} == {"wscl_fast", "naive", "compiled naive", "torch.mm"}


@pytest.mark.usefixtures("graphs")
def test_what_is_not_compiled_says_so() -> None:
    loss = peers.compiled_naive()

    def run(rows: int) -> None:
        loss(torch.randn(rows, 4), query_clusters=torch.zeros(rows, dtype=torch.int64))

    for rows in range(2, 10):
        run(rows)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run(10)


def test_no_such_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["peers_infonce", "--only", "zzz"])
    with pytest.raises(SystemExit):
        peers_infonce.main()
    assert "--only: expected a part of one of ['1024 x 65536 x 128'" in capsys.readouterr().err


def test_each_side_has_its_own_peak() -> None:
    sides: dict[str, Callable[[], object]] = {"one": lambda: None, "other": lambda: None}
    times = interleave(sides, turns=2, peak=lambda _: 1.0, peaks={"other": lambda _: 2.0}, warm=False)
    assert {name: timing.peak for name, timing in times.items()} == {"one": (1.0, 1.0), "other": (2.0, 2.0)}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_kmeans_without_peers(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    """And a share of the peak is that of the instruction that makes a side's products."""
    seen: dict[str, object] = {}

    def timed(sides: dict[str, Callable[[], object]], **settings: Any) -> dict[str, Timing]:
        seen.update(settings["peaks"])
        return called_once(sides)

    monkeypatch.setattr(bench_kmeans, "peers", lambda *_: {})
    monkeypatch.setattr(bench_kmeans, "interleave", timed)
    monkeypatch.setattr(bench_kmeans, "_has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(bench_kmeans, "peak_of", lambda dtype: dtype)
    rows = bench_kmeans.iteration(peers_kmeans.Case("t", 500, 8, 10), 1, 1)
    assert len(rows) == 3 + bfloat16
    assert {row[name] for row in rows for name in row if "peer" in name} == {""}
    assert all(float(str(row["ms"])) > 0 for row in rows)
    assert seen == {"wscl_fast, bfloat16 candidates": torch.bfloat16}


def test_an_iteration_begins_where_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lloyd = pytest.importorskip("sklearn.cluster._k_means_lloyd")
    seen: list[Any] = []
    monkeypatch.setattr(
        lloyd, "lloyd_iter_chunked_dense", lambda x, ones, centroids, *_: seen.append(centroids)
    )
    case = peers_kmeans.Case("t", 500, 8, 10)
    x = case.samples()
    nearest = torch.cdist(x.double(), case.start(x).double()).argmin(1)
    means = torch.stack([x[nearest == k].mean(0) for k in range(10)])
    torch.testing.assert_close(case.centroids(x), means)
    peers_kmeans.scikit_learn("iteration", case, 1)()
    assert torch.equal(torch.from_numpy(seen[0]), case.centroids(x))


def test_stages_tells_that_perf_may_not_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends the child, which would run until it is told to stop."""
    for name, script in (
        ("perf", "echo no permission >&2; exit 255"),
        ("child", "echo ready; exec sleep 20"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("sys.executable", str(tmp_path / "child"))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="perf record ended with 255: no permission"):
        stages.samples(stages.CASES[0], "forward", 0.1)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (bench_infonce, ["--only", "zzz"], "--only: expected a part of one of ['threads', "),
        (bench_infonce, ["--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (bench_kmeans, ["--turns", "-1"], "--turns: expected a whole number of at least 1, got '-1'"),
        (bench_memory, ["--threads", "two"], "--threads: expected a whole number of at least 1, got 'two'"),
        (bench_ring, ["--ranks", "0"], "--ranks: expected a whole number of at least 1, got '0'"),
        (peers_infonce, ["--turns", "0"], "--turns: expected a whole number of at least 1, got '0'"),
    ],
)
def test_options_are_checked_before_anything_is_timed(
    module: Any,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert said in capsys.readouterr().err
