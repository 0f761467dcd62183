"""The pictures: drawn for whatever the encoder came to and however the classes are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from wscl_fast.data import ImageDataset
from wscl_fast.train import figures
from wscl_fast.train.evaluation import Accuracies, Score
from wscl_fast.train.figures import draw_curves, draw_embedding, draw_neighbours, map_to_plane
from wscl_fast.train.results import Result

N = 12


@pytest.mark.parametrize("features", [np.zeros((N, 8)), np.full((N, 8), 0.3), np.full((N, 8), np.nan)])
def test_features_without_spread_are_laid_in_a_row(features: np.ndarray) -> None:
    where = map_to_plane(features.astype(np.float32))
    assert where.tolist() == [[i, 0] for i in range(N)]


def _data(column: str, *names: str) -> ImageDataset:
    return ImageDataset(
        name="money",
        images=np.zeros((N, 3, 8, 8), dtype=np.uint8),
        keys=[str(i) for i in range(N)],
        split=np.array(["train", "test"] * (N // 2)),
        labels={column: np.arange(N) // 2 % len(names)},
        label_names={column: list(names)},
    )


def _result(column: str, *, seed: int = 0, losses: dict[int, float] | None = None) -> Result:
    accuracies = Accuracies(0.5, 0.5, 0.5, 0.5, 0.1)
    scores = {column: Score(accuracies, accuracies, 2, 6, 6, 6)}
    log = [{"kind": "epoch", "epoch": epoch, "loss": loss} for epoch, loss in (losses or {}).items()]
    return Result("none", seed, scores, np.zeros((N, 4), dtype=np.float32), log)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be saved."""
    made: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, file: made.append(figure))
    return made


def test_every_class_is_in_the_legend(drawn: list[Figure]) -> None:
    names = ["_background", "_", "dog"]
    draw_embedding(Path("embedding.png"), [_result("kind")], _data("kind", *names))
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == names


def test_curves_of_logs_that_lost_epochs(drawn: list[Figure]) -> None:
    logs = [{0: 4.0, 1: 2.0, 2: 1.0}, {0: 2.0, 2: 3.0}]
    draw_curves(Path("curves.png"), [_result("kind", seed=s, losses=log) for s, log in enumerate(logs)])
    assert drawn[0].axes[0].get_lines()[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 2]]


def test_dollars_in_names_are_dollars(tmp_path: Path) -> None:
    column = "$_$"
    data, results = _data(column, "a_$^b$", "$_$"), [_result(column)]
    draw_curves(tmp_path / "curves.png", results)
    draw_embedding(tmp_path / "embedding.png", results, data)
    draw_neighbours(tmp_path / "neighbours.png", results, data)
    assert len(list(tmp_path.iterdir())) == 3
