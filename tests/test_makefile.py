"""What is missing on a machine is named in one line, with what to install."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="no make, or no Makefile"
)


def make(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in {"PYTHON": sys.executable, **variables}.items()]
    return subprocess.run(
        ["make", "--silent", "-C", str(folder), *arguments, *settings],
        capture_output=True,
        text=True,
        check=False,
    )


def stub(folder: Path, name: str, script: str) -> str:
    """A program that stands in for one that is missing or old."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machine_has_everything() -> None:
    done = make("check-tools")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("PYTHON", None, "is missing: apt install python3 python3-venv python3-dev"),
        # Fails what it is asked for: the version first, then the venv module, then the headers.
        (
            "PYTHON",
            'case "$*" in *version_info*) exit 1;; *) echo "Python 3.8.1";; esac',
            "Python 3.10 or newer",
        ),
        (
            "PYTHON",
            'case "$*" in *ensurepip*) exit 1;; esac',
            "venv module is missing: apt install python3-venv",
        ),
        ("PYTHON", 'case "$*" in *Python.h*) exit 1;; esac', "headers are missing: apt install python3-dev"),
        ("CXX", None, "a C++17 compiler is missing: apt install g++"),
        ("CXX", "exit 1", "does not understand C++17: apt install g++"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, script: str | None, message: str) -> None:
    program = str(tmp_path / "nothing") if script is None else stub(tmp_path, "stand-in", script)
    done = make("check-tools", **{name: program})
    assert done.returncode != 0
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_the_folder_may_have_spaces_in_its_name(tmp_path: Path) -> None:
    """What is called by its whole name is called in quotes, and found while the extension is built."""
    folder = tmp_path / "a folder"
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for stamp in (".created", ".installed"):
        (folder / ".venv" / stamp).touch()
    stub(tools, "python", 'echo "$*" >>said; command -v ninja >>said')
    stub(tools, "ninja", "")
    done = make(".venv/.built", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (folder / "said").read_text()
    assert "install --no-build-isolation --no-deps --editable ." in said
    assert f"{tools}/ninja" in said


@pytest.mark.parametrize(
    ("target", "there", "message"),
    [
        ("simulate", [], "nvcc is not on PATH"),
        ("simulate", ["nvcc"], "no ptxsim in "),
        ("gpu", [], "no NVIDIA GPU here"),
    ],
)
def test_nothing_is_set_up_for_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, there: list[str], message: str
) -> None:
    if target == "gpu" and (any(Path("/dev").glob("nvidia*")) or Path("/dev/dxg").exists()):
        pytest.skip("there may be a GPU here")
    for name in there:
        stub(tmp_path, name, "")
    for name in ("make", "sh", "ls"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PTXSIM_NVCC", raising=False)
    monkeypatch.setenv("PTXSIM_PATH", str(tmp_path))
    done = make(target)
    assert done.returncode != 0
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1
