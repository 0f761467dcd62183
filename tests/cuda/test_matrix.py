"""What ``make simulate`` keeps, and what throws it away. No kernel runs here."""

from __future__ import annotations

import json
from pathlib import Path

import kmeans_cases
import matrix
import pytest
import test_infonce_simulated
import test_pairs_simulated
import test_tags_simulated
from simulator import CSRC, with_headers


def test_cases_are_decided_by_what_the_kernels_include() -> None:
    names = {path.name for path in with_headers((CSRC / "core").glob("*.cu"))}
    assert {"similarity_pass.cuh", "similarity_tags.cuh", "infonce_cuda.h", "mma.cuh"} <= names
    assert not {name for name in names if "_cpu" in name or "simd" in name}


def test_comments_decide_nothing(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text('"""Said."""\n\ndef f():\n    """Said."""\n    return 1\n')
    other.write_text("def f():\n    return 1  # said\n")
    assert matrix.meaning(one) == matrix.meaning(other)
    other.write_text("def f():\n    return 2\n")
    assert matrix.meaning(one) != matrix.meaning(other)


def test_of_a_module_one_class_may_decide(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("class A:\n    x = 1\n\nclass B:\n    y = 1\n")
    other.write_text("class A:\n    x = 1\n\nclass B:\n    y = 2\n")
    assert matrix.meaning(one, "A") == matrix.meaning(other, "A")
    assert matrix.meaning(one, "B") != matrix.meaning(other, "B")


def test_every_case_has_a_name_of_its_own_and_a_family() -> None:
    cases = matrix.every_case()
    assert {matrix.family_of(which) for which, _ in cases.values()} == set(matrix.FAMILIES)
    assert {case.arch for _, case in cases.values()} == {"80", "90", "100"}
    pairs = len(test_pairs_simulated.PASSES) * len(list(test_pairs_simulated.every_case()))
    others = (test_infonce_simulated, test_tags_simulated, kmeans_cases)
    assert len(cases) == pairs + sum(len(list(module.every_case())) for module in others)


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    folder = tmp_path / f"tags-{matrix.digest('tags')}"
    folder.mkdir()
    (folder / "1.jsonl").write_text(json.dumps({"case": "a", "fault": None}) + '\n{"case": "b", "fau')
    (tmp_path / "tags-of-before").mkdir()
    (tmp_path / "tags-of-before" / "1.jsonl").write_text(json.dumps({"case": "c"}) + "\n")
    assert list(matrix.kept()) == ["a"]


def test_without_the_simulator_it_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PTXSIM_NVCC", "nvcc")
    monkeypatch.setenv("PTXSIM_PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["matrix.py"])
    monkeypatch.setattr(matrix.multiprocessing, "get_context", lambda _: pytest.fail("went on"))
    with pytest.raises(SystemExit, match="1"):
        matrix.main()
    assert capsys.readouterr().err == (
        f"wscl_fast: no ptxsim in {tmp_path}: set PTXSIM_PATH to the folder that contains it\n"
    )
