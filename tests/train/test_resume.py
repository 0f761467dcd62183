"""A run killed in mid-epoch and resumed takes the very steps of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wscl_fast.files import claimed
from wscl_fast.train.checkpoint import load_checkpoint, read_metrics
from wscl_fast.train.cli import main
from wscl_fast.train.settings import load_config

# kmeans carries state from epoch to epoch: features of the model at epoch 1, clusters until epoch 3.
RUN = ["--train.epochs", "4", "--train.batch-size", "4", "--train.log-every", "1",
       "--cluster.method", "kmeans",
       "--cluster.kmeans.n-clusters", "5", "--cluster.kmeans.warmup-epochs", "1",
       "--cluster.kmeans.every", "2", "--cluster.kmeans.momentum", "0.9",
       "--loss.learnable-temperature", "true"]  # fmt: skip
STEPS = 16  # 64 training images, 4 in a batch


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Everything in metrics.jsonl that must not depend on a kill."""
    timing = {"seconds", "images_per_second"}
    return [
        tuple((k, v) for k, v in m.items() if k not in timing) for m in read_metrics(run / "metrics.jsonl")
    ]


def kill_in_mid_epoch(arguments: list[str], run: Path, epoch: int, step: int) -> None:
    """Start a run in a process of its own and `kill -9` it once `step` of `epoch` is in its log."""
    process = subprocess.Popen([sys.executable, "-m", "wscl_fast", *arguments], stdout=subprocess.DEVNULL)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(metrics) if metrics.exists() else []
        if any(m["kind"] == "step" and (m["epoch"], m["step"]) >= (epoch, step) for m in lines):
            break
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_and_resume_equals_an_unbroken_run(own_data: list[str], tmp_path: Path) -> None:
    assert main(["train", "--name", "whole", *own_data, *RUN]) == 0
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"

    command = ["train", "--name", "broken", *own_data, *RUN, "--train.checkpoint-seconds", "0.02"]
    kill_in_mid_epoch(command, broken, epoch=1, step=5)
    position, _ = load_checkpoint(broken / "checkpoint.pt")
    assert (position.epoch, position.step) < (3, STEPS)
    with (broken / "metrics.jsonl").open("a") as stream:  # steps that the last checkpoint does not know
        stream.write('{"kind": "step", "epoch": 9, "step": 9, "loss": 9.0, "lr": 9.0}\n{"kind": "st')

    assert main([*command, "--resume"]) == 0
    assert losses(broken) == losses(whole)
    assert (broken / "encoder.safetensors").read_bytes()[-2000:] == (
        whole / "encoder.safetensors"
    ).read_bytes()[-2000:]
    _, parts = load_checkpoint(broken / "checkpoint.pt")
    _, same = load_checkpoint(whole / "checkpoint.pt")
    for name, value in same["model"].items():
        assert torch.equal(parts["model"][name], value), name
    assert torch.equal(parts["clustering"]["ids"], same["clustering"]["ids"])
    assert parts["loss"]["log_scale"] == same["loss"]["log_scale"]


@pytest.mark.parametrize("again", ["--resume", "--overwrite"])
def test_what_a_kill_left_of_a_checkpoint_is_removed(again: str, own_data: list[str], tmp_path: Path) -> None:
    command, run = ["train", *own_data, "--train.epochs", "1"], tmp_path / "runs" / "train"
    assert main(command) == 0
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / f".checkpoint.{dead.pid}.pt").write_bytes(b"half")
    (run / f".notes.{dead.pid}.txt").write_bytes(b"no file of a run")
    assert main([*command, again]) == 0
    assert [path.name for path in run.iterdir() if path.name[0] == "."] == [f".notes.{dead.pid}.txt"]


def test_resume_in_the_middle_of_an_epoch(
    own_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is resumed from is one within an epoch, for certain: the next step raises."""
    from wscl_fast.train import loop

    assert main(["train", "--name", "whole", *own_data, *RUN]) == 0
    command = ["train", "--name", "broken", *own_data, *RUN, "--train.checkpoint-seconds", "0"]
    step, taken = loop.Learner.step, 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == STEPS + 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(loop.Learner, "step", failing)
    assert main(command) == 130
    position, _ = load_checkpoint(tmp_path / "runs" / "broken" / "checkpoint.pt")
    assert (position.epoch, position.step) == (1, 6)
    assert main([*command, "--resume"]) == 0
    assert losses(tmp_path / "runs" / "broken") == losses(tmp_path / "runs" / "whole")


def test_resume_with_several_label_columns(
    own_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wscl_fast.train import loop

    levels = ["--data.label-columns", "shape,label", "--cluster.method", "labels",
              "--cluster.labels.columns", "shape,label", "--train.epochs", "2"]  # fmt: skip
    assert main(["train", "--name", "whole", *own_data, *levels]) == 0
    step, taken = loop.Learner.step, 0

    def failing(self: Any, views: Any, clusters: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        assert clusters.shape == (16, 2)
        if taken == 6:
            raise KeyboardInterrupt
        return step(self, views, clusters, **kwargs)

    monkeypatch.setattr(loop.Learner, "step", failing)
    command = ["train", "--name", "broken", *own_data, *levels, "--train.checkpoint-seconds", "0"]
    assert main(command) == 130
    taken = 6
    assert main([*command, "--resume"]) == 0
    assert losses(tmp_path / "runs" / "broken") == losses(tmp_path / "runs" / "whole")


def test_a_finished_run_that_lost_its_log_is_told_of(own_data: list[str], tmp_path: Path) -> None:
    assert main(["train", *own_data, "--train.epochs", "1"]) == 0
    run = tmp_path / "runs" / "train"
    first, _, _ = (run / "metrics.jsonl").read_text().partition("\n")
    (run / "metrics.jsonl").write_text(first + "\n")
    assert main(["train", *own_data, "--train.epochs", "1", "--resume"]) == 0
    assert "## Training" not in (run / "report.md").read_text()


def test_ctrl_c_says_how_to_go_on(
    own_data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wscl_fast.train import jobs

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", interrupted)
    command = ["train", "--name", "n", *own_data, "--train.epochs", "2"]
    assert main(command) == 130
    assert "continue with: wscl-fast train --name n" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0  # no checkpoint was written yet: from the start


def test_resume_refuses_to_become_another_run(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*own_data, "--train.epochs", "1"]
    assert main(["train", *short, "--resume"]) == 2
    assert f"no run at {tmp_path}/runs/train: nothing to resume" in capsys.readouterr().err
    assert main(["train", *short]) == 0
    assert main(["train", *short]) == 2
    assert (
        "holds a run already: continue it with --resume, replace it with --overwrite"
        in capsys.readouterr().err
    )
    assert main(["train", *short, "--optim.lr", "0.5", "--resume"]) == 2
    assert "'optim.lr' differs" in capsys.readouterr().err
    assert main(["train", "--runs-dir", str(tmp_path / "runs"), "--resume"]) == 0  # finished: judged again
    assert main(["train", *short, "--overwrite", "--optim.lr", "0.5"]) == 0


def test_resume_refuses_other_data_and_takes_another_evaluation(
    squares: Path, own_data: list[str], tmp_path: Path, check_refused: Callable[[list[str], str, Path], None]
) -> None:
    table, run = tmp_path / "table.csv", tmp_path / "runs" / "train"
    lines = (squares / "table.csv").read_text().splitlines(keepends=True)
    table.write_text("".join(lines))
    command = ["train", *own_data, "--data.table", str(table), "--train.epochs", "1"]
    assert main(command) == 0
    for changed in (lines[:-3], [lines[0], *lines[:0:-1]], [*lines[:-1], lines[-1].replace("#", "#x")]):
        table.write_text("".join(changed))
        check_refused([*command, "--resume"], f"the data changed since {run} began", run)
    table.write_text("".join(lines))
    assert main([*command, "--resume", "--eval.knn-k", "1"]) == 0
    assert "k = 1," in (run / "evaluation.json").read_text()
    assert load_config(run / "config.yaml").eval.knn_k == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.encoder", "resnet99"],
        ["--eval.labels", "labl"],
        ["--cluster.method=attributes", "--data.attribute-columns", "shape", "--cluster.attributes.top-k=5"],
    ],
)
def test_a_setting_that_cannot_be_leaves_the_folder_as_it_is(
    wrong: list[str], own_data: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "train"
    assert main(["train", *own_data, *wrong]) == 2
    assert not run.exists()
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {epochs: 1}\n")
    assert main(["train", *own_data, *wrong, "--overwrite"]) == 2
    assert [p.read_text() for p in run.iterdir()] == ["train: {epochs: 1}\n"]


@pytest.mark.parametrize("command", [["train", "--overwrite"], ["compare", "--compare.methods", "pixels"]])
def test_two_do_not_write_to_one_run(
    command: list[str], own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / command[0]
    held = run if command[0] == "train" else run / "pixels"
    with claimed(held):
        assert main([*command, *own_data]) == 2
        assert f"{held} is being written to by another process" in capsys.readouterr().err
        assert not list(held.iterdir())


def test_features_that_are_not_finite_are_no_result(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step, whose loss is still finite."""
    wild = ["--train.batch-size", "64", "--optim.name", "sgd", "--optim.lr", "1e30", "--train.epochs", "1"]
    assert main(["train", *own_data, *wild, "--optim.warmup-epochs", "0"]) == 1
    assert capsys.readouterr().err == (
        "wscl-fast: error: the encoder's features are not finite: lower optim.lr\n"
    )
    assert not (tmp_path / "runs" / "train" / "encoder.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = [
        "--optim.name",
        "sgd",
        "--optim.lr",
        "1e30",
        "--optim.warmup-epochs",
        "0",
        "--train.checkpoint-seconds",
        "0",
    ]
    assert main(["train", *own_data, *wild]) == 1
    message = capsys.readouterr().err
    assert message.startswith("wscl-fast: error: the loss is nan in epoch 1, step ")
    assert message.count("\n") == 1
    saved = json.dumps(load_checkpoint(tmp_path / "runs" / "train" / "checkpoint.pt")[0].losses)
    assert "NaN" not in saved
