"""The trainer on a GPU: trains, evaluates and embeds as on the CPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wscl_fast.train.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("method", ["tags", "kmeans"])
def test_a_run_on_a_gpu(own_data: list[str], tmp_path: Path, method: str) -> None:
    on_gpu = ["--train.device", "cuda"]
    settings = ["--cluster.method", method, "--train.epochs", "3", "--loss.learnable-temperature", "true"]
    if method == "kmeans":
        settings += ["--cluster.kmeans.n-clusters", "5", "--cluster.kmeans.warmup-epochs", "1"]
    assert main(["train", *own_data, *on_gpu, *settings]) == 0
    run = tmp_path / "runs" / "train"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["kind"] == "step"]
    assert all(np.isfinite(losses))
    scores = json.loads((run / "evaluation.json").read_text())["results"][0]["scores"]["label"]
    assert scores["images"]["linear_top1"] > 0.5  # four colours; chance is 0.25
    assert main(["embed", "--run", str(run), "--out", str(tmp_path / "out"), *on_gpu]) == 0
    assert np.isfinite(np.load(tmp_path / "out" / "features.npy")).all()
    assert len(list(csv.DictReader((tmp_path / "out" / "keys.csv").open()))) == 96
