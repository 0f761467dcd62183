"""A file that is replaced is the old one or the new one, never something in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wscl_fast.files import claimed, remove_leftovers, replacing, write_text


def test_the_old_content_stands_until_the_new_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "ids.csv"
    write_text(file, "old")
    with replacing(file) as beside:
        beside.write_text("half")
        assert file.read_text() == "old"
        assert beside.suffix == ".csv"
        assert beside.parent == tmp_path
    assert file.read_text() == "half"
    assert [*tmp_path.iterdir()] == [file]


def test_an_error_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "ids.csv"
    write_text(file, "old")

    def write_half() -> None:
        with replacing(file) as beside:
            beside.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_several_at_once_each_write_a_whole_one(tmp_path: Path) -> None:
    """Threads of a process; processes of one number in containers that share a folder are no different."""
    file = tmp_path / "ids.csv"
    with replacing(file) as last:
        with replacing(file) as first:
            first.write_text("first")
            last.write_text("la")
        assert file.read_text() == "first"
        last.write_text("last")
        with replacing(file) as left:
            pass
        left.write_text("of a third that was killed")
    assert file.read_text() == "last"
    remove_leftovers(file)
    assert [*tmp_path.iterdir()] == [file]


def test_others_may_read_it(tmp_path: Path) -> None:
    file, plain = tmp_path / "ids.csv", tmp_path / "plain.csv"
    write_text(file, "new")
    plain.write_text("new")
    assert file.stat().st_mode == plain.stat().st_mode


def test_what_a_kill_left_is_removed_and_what_others_write_stays(tmp_path: Path) -> None:
    file = tmp_path / "ids.csv"
    script = (
        "import os, signal, sys; from pathlib import Path; from wscl_fast.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as beside:\n"
        "    beside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, str(file)])
    killed.wait()
    left = tmp_path / f".ids.{killed.pid}.csv"
    others = [
        tmp_path / name
        for name in (
            f".ids.{os.getppid()}.csv",  # a living process's
            f".ids.{killed.pid}.npy",
            f".ids.old.{killed.pid}.csv",
            ".ids.old.csv",
            "ids.1.csv",
        )
    ]
    assert left.read_text() == "half"
    for other in others:
        other.write_text("other")
    (tmp_path / f".ids.{os.getpid()}.csv").write_text("of an earlier process of this number")
    (tmp_path / ".ids.99999999999999999999.csv").write_text("of no process")
    remove_leftovers(file)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    remove_leftovers(tmp_path / "no folder" / "ids.csv")


def test_a_folder_is_for_one_process_until_it_is_done_or_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from wscl_fast.files import claimed\n"
        "with claimed(Path(sys.argv[1])):\n"
        "    print('has it', flush=True); sys.stdin.read()"
    )
    for end in ("close", "kill"):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == b"has it\n"
            with (
                pytest.raises(ValueError, match="run is being written to by another process"),
                claimed(folder),
            ):
                pass
            other.kill() if end == "kill" else other.stdin.close()
            other.wait()
        with claimed(folder):
            pass
    assert not list(folder.iterdir())
