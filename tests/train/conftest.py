"""A small world to train on: coloured squares in a folder, with a table of what is known about them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wscl_fast.train.cli import main

SHADES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


def make_folder(folder: Path, per_colour: int = 24, side: int = 12) -> Path:
    """Noisy squares of four colours; the table has tags, attributes, hierarchy, cluster, label and split."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = []
    for number in range(per_colour * len(SHADES)):
        colour = list(SHADES)[number % len(SHADES)]
        pixels = np.clip(np.array(SHADES[colour]) + rng.normal(0, 25, (side, side, 3)), 0, 255).astype(
            np.uint8
        )
        Image.fromarray(pixels).save(pictures / f"{number:03}.png")
        rows.append(
            {
                "path": f"{number:03}.png",
                "split": "test" if number % 3 == 2 else "train",
                "label": colour,
                "tags": f"#{colour} #square #n{number % 5}",
                "shape": "square" if number % 2 else "box",
                "tone": colour,
                "branch": f"things/{'warm' if colour == 'red' else 'cold'}/{colour}",
                "cluster": f"c{number % 4}",
            }
        )
    with (folder / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, made once."""
    return make_folder(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def own_data(squares: Path, tmp_path: Path) -> list[str]:
    """Arguments that train the smallest model on the squares, its run under tmp_path."""
    return [
        "--data.folder", str(squares / "pictures"), "--data.table", str(squares / "table.csv"),
        "--data.image-size", "8", "--data.cache-dir", str(squares / "cache"),
        "--runs-dir", str(tmp_path / "runs"), "--model.widths", "4,8", "--model.depths", "1,1",
        "--model.head-hidden", "16", "--model.head-dim", "8",
        "--train.batch-size", "16", "--train.threads", "1", "--train.device", "cpu", "--eval.knn-k", "5",
    ]  # fmt: skip


@pytest.fixture
def check_refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str, Path], None]:
    """That a command ends with exit code 2 and a message, and leaves every file under a folder as it was."""

    def contents(folder: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def check(arguments: list[str], message: str, folder: Path) -> None:
        stood = contents(folder)
        assert stood
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert contents(folder) == stood

    return check
