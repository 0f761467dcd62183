"""The pictures: drawn for whatever the encoder came to and however the classes are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wscl_fast.data import ImageDataset
from wscl_fast.train.evaluation import Accuracies, Score
from wscl_fast.train.figures import draw_curves, draw_embedding, draw_neighbours, map_to_plane
from wscl_fast.train.results import Result

N = 12


@pytest.mark.parametrize("features", [np.zeros((N, 8)), np.full((N, 8), 0.3), np.full((N, 8), np.nan)])
def test_features_without_spread_are_laid_in_a_row(features: np.ndarray) -> None:
    where = map_to_plane(features.astype(np.float32))
    assert where.tolist() == [[i, 0] for i in range(N)]


def test_dollars_in_names_are_dollars(tmp_path: Path) -> None:
    column = "$_$"
    data = ImageDataset(
        name="money",
        images=np.zeros((N, 3, 8, 8), dtype=np.uint8),
        keys=[str(i) for i in range(N)],
        split=np.array(["train", "test"] * (N // 2)),
        labels={column: np.arange(N) // 2 % 2},
        label_names={column: ["a_$^b$", "$_$"]},
    )
    accuracies = Accuracies(0.5, 0.5, 0.5, 0.5, 0.1)
    scores = {column: Score(accuracies, accuracies, 2, 6, 6, 6)}
    results = [Result("none", 0, scores, np.zeros((N, 4), dtype=np.float32))]
    draw_curves(tmp_path / "curves.png", results)
    draw_embedding(tmp_path / "embedding.png", results, data)
    draw_neighbours(tmp_path / "neighbours.png", results, data)
    assert len(list(tmp_path.iterdir())) == 3
