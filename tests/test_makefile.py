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


def check(**variables: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in {"PYTHON": sys.executable, **variables}.items()]
    return subprocess.run(
        ["make", "--silent", "-C", str(ROOT), "check-tools", *settings],
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
    done = check()
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
    done = check(**{name: program})
    assert done.returncode != 0
    assert message in done.stdout
    assert len(done.stdout.splitlines()) == 1
