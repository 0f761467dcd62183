"""A file that is replaced is the old one or the new one, never something in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from wscl_fast.files import replacing, write_text


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


def test_others_may_read_it(tmp_path: Path) -> None:
    file, plain = tmp_path / "ids.csv", tmp_path / "plain.csv"
    write_text(file, "new")
    plain.write_text("new")
    assert file.stat().st_mode == plain.stat().st_mode
