"""A comparison: its table, its files, its members kept and resumed, its workers minded."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wscl_fast.train.cli import main
from wscl_fast.train.config import DataConfig
from wscl_fast.train.evaluation import Accuracies, Score
from wscl_fast.train.monitor import Bar, Monitor, Silent
from wscl_fast.train.report import aligned, table
from wscl_fast.train.results import Result
from wscl_fast.train.workers import WorkerError, run_tasks

SMALL = ["--train.epochs", "2", "--cluster.kmeans.n-clusters", "4", "--cluster.kmeans.warmup-epochs", "1"]


def test_compare_end_to_end(
    own_data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    check_refused: Callable[[list[str], str, Path], None],
) -> None:
    """Two workers; then a member lost and one method more: only what is missing is trained."""
    command = ["compare", *own_data, *SMALL, "--compare.seeds", "3,4", "--compare.workers", "2"]
    assert main([*command, "--compare.methods", "random,pixels,none,tags"]) == 0
    out = capsys.readouterr().out
    assert "training 4 runs of 2 epochs, 2 side by side" in out
    assert "Cl-InfoNCE, hashtags, seed 4: label" in out
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "method", "random encoder", "pixels", "InfoNCE, no auxiliary information", "Cl-InfoNCE, hashtags"
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"Cl-InfoNCE, hashtags +\| +[\d.]+ ± [\d.]+ \| +[\d.]+ ± [\d.]+ \|", out)
    assert "±" not in next(line for line in lines if "pixels" in line)

    run = tmp_path / "runs" / "compare"
    for name in ("config.yaml", "report.md", "curves.png", "embedding.png", "nearest-neighbours.png"):
        assert (run / name).stat().st_size > 500
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {(m["method"], m["seed"]) for m in metrics} == {("none", 3), ("none", 4), ("tags", 3), ("tags", 4)}
    assert (run / "encoder.safetensors").read_bytes() == (
        run / "tags-seed3" / "encoder.safetensors"
    ).read_bytes()
    report = (run / "report.md").read_text()
    assert "is the encoder of: Cl-InfoNCE, hashtags, seed 3" in report
    assert "mean ± standard deviation over 2 seeds" in report
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert len(results) == 7  # 2 random encoders, pixels once, 2 × 2 trained

    (run / "tags-seed3" / "evaluation.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in run.glob("*-seed*/encoder.safetensors")}
    command += ["--compare.workers", "1"]
    assert main([*command, "--compare.methods", "random,pixels,none,tags,kmeans"]) == 0
    out = capsys.readouterr().out
    assert "6 of 9 runs stand already" in out
    assert "training 3 runs" in out
    assert "k-means clusters" in out
    untouched = {p for p, t in before.items() if p.stat().st_mtime_ns == t}
    assert {p.parent.name for p in untouched} == {"none-seed3", "none-seed4", "tags-seed4"}
    again = json.loads((run / "evaluation.json").read_text())["results"]
    kept = [r for r in again if r["method"] != "kmeans"]
    assert kept == results  # the lost one was resumed from its last epoch: the same scores

    other = [*command, "--compare.methods", "none", "--optim.lr", "0.01"]
    check_refused(other, "holds another run ('optim.lr' differs): replace it with --overwrite", run)
    assert main([*other, "--overwrite"]) == 0
    assert "training 2 runs" in capsys.readouterr().out  # another budget: the old members do not count


def test_what_stands_is_not_replaced_unasked(
    squares: Path,
    own_data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    check_refused: Callable[[list[str], str, Path], None],
) -> None:
    table, run = tmp_path / "table.csv", tmp_path / "runs" / "compare"
    lines = (squares / "table.csv").read_text().splitlines(keepends=True)
    table.write_text("".join(lines))
    command = ["compare", *own_data, "--data.table", str(table), "--compare.seeds", "0"]
    command += ["--compare.methods", "pixels"]
    assert main(command) == 0
    for changed in (lines[:-3], [*lines[:-1], lines[-1].replace("grey", "red")]):
        table.write_text("".join(changed))
        check_refused(command, f"the data changed since {run}/pixels began", run)
    assert main([*command, "--overwrite"]) == 0

    assert main([*command, "--eval.knn-k", "1"]) == 0  # judged anew, not refused
    evaluation = (run / "pixels" / "evaluation.json").read_text()
    assert "k = 1," in evaluation
    assert main([*command, "--overwrite", "--compare.methods", "none", "--model.encoder", "resnet99"]) == 2
    assert (run / "pixels" / "evaluation.json").read_text() == evaluation

    (run / "checkpoint.pt").touch()  # as a single run leaves it
    assert main([*command, "--eval.knn-k", "1"]) == 2
    assert f"{run} holds a single run: replace it with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare.methods", "none,hierarchy"], "needs data.hierarchy_columns"),
        (["--compare.methods", "[]"], "need at least one entry"),
        (["--compare.seeds", ""], "need at least one entry"),
        (["--compare.methods", "none,supcon"], "compare.methods cannot be 'supcon'"),
        (["--compare.methods", "none,none"], "methods must differ from each other, got none more than once"),
        (["--compare.seeds", "0,1,0"], "seeds must differ from each other, got 0 more than once"),
        (["--compare.seeds=-1"], "seeds must be from 0 to 9223372036854775807, got -1"),
        (["--compare.methods", "none,kmeans", "--train.epochs", "5"], "cluster.kmeans.warmup_epochs"),
    ],
)
def test_bad_comparisons(
    arguments: list[str], message: str, own_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *own_data, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_member_that_diverges_stops_the_comparison(
    own_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wild = [
        "--optim.name",
        "sgd",
        "--optim.lr",
        "1e30",
        "--optim.warmup-epochs",
        "0",
        "--compare.workers",
        "2",
    ]
    assert main(["compare", *own_data, *wild, "--compare.methods", "none,tags"]) == 1
    assert "wscl-fast: error: the loss is nan" in capsys.readouterr().err


def scores(value: float) -> dict[str, Score]:
    """The same accuracy in every column; a group of variants counts for a tenth less than its images."""
    images, groups = (Accuracies(v, v, v, v, 0.1) for v in (value, value - 0.1))
    return {"kind": Score(images, groups, 4, 30, 10, 5)}


def test_the_table_has_mean_and_spread() -> None:
    features = np.zeros((1, 1), dtype=np.float32)
    results = [Result("none", 0, scores(0.5), features), Result("none", 1, scores(0.6), features)]
    assert table([*results, Result("pixels", 0, scores(0.25), features)]).splitlines() == [
        "| method                            | kind linear |  kind k-NN |",
        "|:----------------------------------|------------:|-----------:|",
        "| InfoNCE, no auxiliary information |  55.0 ± 7.1 | 55.0 ± 7.1 |",
        "| pixels                            |        25.0 |       25.0 |",
    ]
    by_group = table(results, counting="groups").splitlines()
    assert by_group[2] == "| InfoNCE, no auxiliary information |  45.0 ± 7.1 | 45.0 ± 7.1 |"


def test_names_do_not_break_the_table() -> None:
    assert aligned(["", "dog|cat\nlinear"], [["x", "1"]]).splitlines() == [
        r"|   | dog\|cat linear |",
        r"|:--|----------------:|",
        r"| x |               1 |",
    ]


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.images = 0

    def advance(self, images: int, note: str = "") -> None:
        self.images += images

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Monitor], str]:
    """A task that does what it is called, in a module that a fresh process can import."""
    (tmp_path / "tasks_to_run.py").write_text(
        """
import os, time

def work(task, monitor):
    monitor.start(100, 2)
    monitor.advance(3)
    monitor.say("a line of one run")
    monitor.stop()
    if task == "mistake":
        raise ValueError("a user's mistake")
    if task == "bug":
        raise KeyError("a bug")
    if task == "die":
        os._exit(9)
    if task == "sleep":
        time.sleep(60)
    return task
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tasks_to_run", raising=False)
    return importlib.import_module("tasks_to_run").work  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_all_done(workers: int, work: Callable[[str, Monitor], str]) -> None:
    heard = Heard()
    run_tasks(work, ["a", "b", "c"], workers=workers, threads=1, monitor=heard)
    assert sorted(line for line in heard.lines if line != "a line of one run") == ["a", "b", "c"]
    assert heard.images == (15 if workers == 2 else 9)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("mistake", ValueError, "a user's mistake"),
        ("bug", WorkerError, "a bug"),
        ("die", WorkerError, "a worker died with exit code 9"),
    ],
)
def test_a_failed_task_ends_the_others(
    task: str, kind: type[Exception], message: str, work: Callable[[str, Monitor], str]
) -> None:
    began = time.monotonic()
    with pytest.raises(kind, match=message):
        run_tasks(work, ["sleep", task], workers=2, threads=1, monitor=Heard())
    assert time.monotonic() - began < 30


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """They are not its own children, and two generations must never write one folder."""
    (tmp_path / "tasks_to_leave.py").write_text(
        f"""
import os, sys, time
from wscl_fast.train.monitor import Silent
from wscl_fast.train.workers import expect_workers, run_tasks

def work(task, monitor):
    open(f"{tmp_path}/{{task}}.pid", "w").write(str(os.getpid()) + " ")
    while True:
        monitor.advance(1)
        time.sleep(0.02)

if __name__ == "__main__":
    expect_workers("wscl_fast.train.workers")
    run_tasks(work, ["a", "b"], workers=2, threads=1, monitor=Silent())
"""
    )
    parent = subprocess.Popen([sys.executable, "tasks_to_leave.py"], cwd=tmp_path)
    begun = [tmp_path / "a.pid", tmp_path / "b.pid"]
    try:
        wait_until(lambda: all(file.exists() and file.read_text().endswith(" ") for file in begun))
    finally:
        parent.kill()
        parent.wait()
    workers = [int(file.read_text()) for file in begun]
    assert parent.pid not in workers
    wait_until(lambda: not any(runs(worker) for worker in workers))


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process does, where nobody may have asked yet how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_bar_speaks_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(quiet_seconds=0.0)
    bar.start(100, 20)
    time.sleep(0.01)
    bar.advance(30, "note")
    bar.say("a line")
    bar.stop()
    out = capsys.readouterr().out
    assert re.search(r"50%  [\d,]+ img/s, 00:00 left\na line\n", out)


def test_recipes_differ_in_their_budget_alone() -> None:
    from wscl_fast.train.cli import _recipe, _recipes
    from wscl_fast.train.settings import differences, load_config

    assert _recipes() == ["openmoji", "reproduce"]
    short, long = (load_config(_recipe(name)) for name in _recipes())
    assert set(differences(short, long)) == {
        "name",
        "train.epochs",
        "compare.methods",
        "compare.seeds",
    }


def test_without_a_list_everything_is_compared(squares: Path) -> None:
    from wscl_fast.train.compare import servable_methods
    from wscl_fast.train.runs import load_data

    data = DataConfig(
        folder=str(squares / "pictures"),
        table=str(squares / "table.csv"),
        image_size=8,
        cache_dir=str(squares / "cache"),
        hierarchy_columns=("branch",),
    )
    found = servable_methods(load_data(data))
    assert found == ("random", "pixels", "none", "tags", "hierarchy", "ids", "kmeans", "labels")
