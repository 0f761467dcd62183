"""The examples and the README's snippets run as printed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_learns() -> None:
    losses = load(ROOT / "examples" / "plain_pytorch.py").main(steps=30)
    assert losses[-1] < losses[0] - 0.1


def test_memory_queue_learns() -> None:
    losses = load(ROOT / "examples" / "memory_queue.py").main(steps=60, queue_size=2048, batch=128)
    assert losses[29] < losses[16]  # the queue is full from then on
    assert losses[59] < losses[30] - 0.05  # the new clustering is learnt


@pytest.mark.parametrize("package", ["lightning", "accelerate", "lightly"])
def test_inside_other_trainers(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "lightly":
        pytest.importorskip("torchvision", reason="lightly needs torchvision")
    monkeypatch.chdir(tmp_path)
    losses = load(ROOT / "examples" / f"in_{package}.py").main()
    assert losses[-1] < losses[0] - 0.1


def test_processes_together_learn_what_one_learns_alone() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    printed = []
    for launcher in ([], torchrun):
        command = [sys.executable, *launcher, str(ROOT / "examples" / "ddp.py")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert re.fullmatch(r"loss \d+\.\d{3} -> \d+\.\d{3}\n", printed[0])
    assert printed[0] == printed[1]


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run_as_printed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^import (lightning)$", SNIPPETS[number], flags=re.MULTILINE):
        pytest.importorskip(package, reason=f"{package} is not installed")
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {})


def test_the_readme_has_snippets_for_each_kind_of_user() -> None:
    assert len(SNIPPETS) >= 3
