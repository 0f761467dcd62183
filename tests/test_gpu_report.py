"""What ``make gpu`` does, as far as it can be seen without a GPU: its logic, limits and report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_cuda, bench_cuda_kmeans, cuda_timing, gpu_report
from benchmarks.gpu_report import Step

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--out", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=gpu_report.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("make gpu: PyTorch ")
    assert "finds no CUDA device; nothing was run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_step_is_run_cut_off_or_left_out() -> None:
    done = gpu_report.run_step("a", [sys.executable, "-c", "print('all well')"], 60)
    assert (done.status, done.output) == ("ok", "all well\n")
    assert done.well
    failed = gpu_report.run_step("b", [sys.executable, "-c", "raise SystemExit('no')"], 60)
    assert (failed.status, failed.output) == ("failed", "no\n")
    assert not failed.well
    start = time.monotonic()
    # A child of the child holds the pipe: all of the group has to go.
    script = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    cut = gpu_report.run_step("c", [sys.executable, "-c", script], 3)
    assert (cut.status, cut.output) == ("cut off", "begun\n")
    assert time.monotonic() - start < 30
    assert gpu_report.run_step("d", ["never started"], 0.5).status == "skipped: the time was up"
    script = "import os; print(os.environ['WSCL_SAID'], 'PATH' in os.environ)"
    told = gpu_report.run_step("e", [sys.executable, "-c", script], 60, environment={"WSCL_SAID": "so"})
    assert told.output == "so True\n"


def test_tests_of_which_none_ran_did_not_go_well() -> None:
    assert gpu_report.nothing_ran(Step("tests", "ok", 1, "12 passed, 3 skipped")).well
    assert not gpu_report.nothing_ran(Step("tests", "ok", 1, "15 skipped in 1 s")).well


def test_the_report_tells_everything(tmp_path: Path) -> None:
    results = bench_cuda.bench(CPU, bench_cuda.ON_CPU[:1], 0.01, 60)
    steps = [
        Step("tests", "ok", 12.3, "10 passed"),
        Step("compute-sanitizer", "skipped: it is not on PATH", 0, ""),
        Step("other", "failed", 1, "\n".join(f"line {i}" for i in range(100))),
    ]
    path = tmp_path / "results" / "gpu.md"
    gpu_report.write_report(path, {"device": "Abacus 9000, sm_90"}, steps, {"benchmarks": results})
    text = path.read_text()
    assert "- device: Abacus 9000, sm_90" in text
    assert "| tests | ok | 12 |" in text
    assert "| compute-sanitizer | skipped: it is not on PATH | 0 |" in text
    assert "line 99" in text
    assert "line 30" not in text
    assert f"| {bench_cuda.ON_CPU[0]} | both | wscl_fast |" in text
    assert all(f"- {reason}" in text for reason in results["left out"])
    assert list(path.parent.iterdir()) == [path]
    gpu_report.write_report(path, {}, steps[2:], {})
    assert "Benchmarks" not in path.read_text()


def fake_gpu(monkeypatch: pytest.MonkeyPatch, status: dict[str, str]) -> list[list[str]]:
    """Stands in for a machine with a GPU: no step is run, each comes out as told."""
    commands: list[list[str]] = []

    def run_step(name: str, command: list[str], limit: float, **_: Any) -> Step:
        commands.append(command)
        assert limit <= 600
        if "--json" in command:
            Path(command[command.index("--json") + 1]).write_text(
                json.dumps({"about": ["700 TFLOP/s"], "rows": [], "left out": ["Inf-CL: left out"]})
            )
        return Step(name, status.get(name.split()[0], "ok"), 1.0, "3 passed")

    monkeypatch.setattr(gpu_report, "why_not", str)
    monkeypatch.setattr(gpu_report, "device_facts", lambda: {"device": "Abacus 9000"})
    monkeypatch.setattr(gpu_report, "run_step", run_step)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: f"/bin/{name}")
    return commands


@pytest.mark.parametrize(
    ("status", "code"), [({}, 0), ({"tests": "failed"}, 1), ({"benchmarks": "cut off"}, 1)]
)
def test_all_in_one_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: dict[str, str], code: int
) -> None:
    commands = fake_gpu(monkeypatch, status)
    assert gpu_report.main(["--out", str(tmp_path / "gpu.md")]) == code
    assert len(commands) == 1 + len(gpu_report.TOOLS) + len(gpu_report.BENCHMARKS)
    assert sum(command[4:6] == ["-m", "gpu"] for command in commands) == 1
    assert sum(gpu_report.SANITIZED in command for command in commands) == len(gpu_report.TOOLS)
    text = (tmp_path / "gpu.md").read_text()
    assert "700 TFLOP/s" in text
    assert "- Inf-CL: left out" in text


def test_the_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.bench_cuda", "--device", "cpu", "--seconds", "0.01"]
    subprocess.run([*command, "--json", str(path)], cwd=gpu_report.ROOT, check=True, timeout=300)
    found = json.loads(path.read_text())
    names = {row["side"] for row in found["rows"]}
    assert {"wscl_fast", "naive PyTorch", "SDPA(q, k, k)"} <= names
    assert {row["gradients"] for row in found["rows"]} == {"none", "queries", "both"}
    for row in found["rows"]:
        assert 0 < row["ms 10 %"] <= row["ms"] <= row["ms 90 %"]
        assert row["peak MiB"] is None
        if row["side"] == "wscl_fast":
            assert row["wscl_fast is faster by"] == 1
    # Where a peer is not installed, or cannot run on a CPU, that is told.
    if not names & {"Inf-CL"}:
        assert any(reason.startswith("Inf-CL") for reason in found["left out"])


def test_the_benchmark_of_kmeans_runs_on_a_cpu(tmp_path: Path, extension: object) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.bench_cuda_kmeans", "--device", "cpu", "--seconds", "0.01"]
    subprocess.run([*command, "--json", str(path)], cwd=gpu_report.ROOT, check=True, timeout=300)
    found = json.loads(path.read_text())
    sides = {row["side"]: row for row in found["rows"]}
    assert {"wscl_fast", "torch: addmm, argmin, index_add", "torch.mm alone"} <= set(sides)
    assert float(sides["torch: addmm, argmin, index_add"]["same assignments"]) > 0.99
    assert all(0 < row["ms 10 %"] <= row["ms"] <= row["ms 90 %"] for row in found["rows"])
    cases = bench_cuda_kmeans.bench(CPU, bench_cuda_kmeans.ON_CPU, 0.01, -1)
    assert cases["left out"] == ["tiny: left out (the time was up)"]


def test_a_side_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cuda.peers, "naive", lambda **_: torch.tensor(1e6))
    found = bench_cuda.bench(CPU, bench_cuda.ON_CPU[1:2], 0.01, 60)
    assert any("naive PyTorch at" in r and "ArithmeticError" in r for r in found["left out"])
    assert "naive PyTorch" not in {row["side"] for row in found["rows"]}


def test_when_the_time_is_up_the_rest_is_told() -> None:
    found = bench_cuda.bench(CPU, bench_cuda.ON_CPU, 0.01, -1)
    assert not found["rows"]
    assert found["left out"] == [f"{case}: left out (the time was up)" for case in bench_cuda.ON_CPU]


def test_timing() -> None:
    calls: list[int] = []
    measured = cuda_timing.measure(lambda: calls.append(0), CPU, warm_up=2, repetitions=10)
    assert len(measured.ms) == 10
    assert len(calls) == 12
    assert measured.quantile(0.0) <= measured.median <= measured.quantile(1.0)
    slow = cuda_timing.measure(lambda: time.sleep(0.05), CPU, warm_up=1, repetitions=100, seconds=0.01)
    assert len(slow.ms) == 3


@pytest.mark.parametrize("size", [[], ["--short"]])
def test_what_the_sanitizer_watches_runs(size: list[str], extension: object) -> None:
    script = gpu_report.ROOT / gpu_report.SANITIZED
    command = [sys.executable, str(script), "--device", "cpu", *size]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *steps, last = done.stdout.splitlines()
    assert last == f"{3 * (4 * 2 * 2 + 2 * 6 + 2)} problems"
    assert len(steps) == 3 * (4 + 2 + 1)
    assert all(re.fullmatch(r".+, torch\.\w+(, d = \d+)?: \d+ s", step) for step in steps)


def test_the_tests_for_a_gpu_are_found_where_there_is_one() -> None:
    """Modules ask what a GPU can do when they are loaded: collected as if there were one."""
    script = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "tests/cuda"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gpu_report.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for name in ("test_infonce_gpu.py", "test_kmeans_gpu.py"):
        assert f"tests/cuda/{name}::" in done.stdout
