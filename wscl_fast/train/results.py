"""What a trained (or an untrained) method came to: its scores, its features, its curve."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wscl_fast.data import Augment, ImageDataset
from wscl_fast.files import replacing, write_text
from wscl_fast.train.checkpoint import read_metrics
from wscl_fast.train.config import Config
from wscl_fast.train.evaluation import Score, evaluate, protocol
from wscl_fast.train.features import Features, extract_features, pixel_features
from wscl_fast.train.loop import METRICS, choose_device
from wscl_fast.train.model import ContrastiveModel, make_model
from wscl_fast.train.runs import EVALUATION, FEATURES


@dataclass(frozen=True)
class Result:
    """One method under one seed."""

    method: str
    seed: int
    scores: dict[str, Score]
    features: Features  # float32 [n, d], one row per sample of the data set
    metrics: list[dict[str, Any]] = field(default_factory=list)


def can_evaluate(config: Config, dataset: ImageDataset) -> bool:
    """Whether there is anything to judge by: labels, and a test split."""
    return bool(dataset.labels) and config.eval.labels != () and len(dataset.indices("test")) > 0


def judge(
    config: Config, dataset: ImageDataset, method: str, seed: int, model: ContrastiveModel | None
) -> Result:
    """Features and scores of a trained model, or of the baseline `random` or `pixels`."""
    if method == "pixels":
        features = pixel_features(dataset.images)
    else:
        device = choose_device(config.train.device)
        if model is None:
            model = make_model(config.model, dataset.images.shape[-1], seed=seed).to(device)
        normalise = Augment(config.augment).normalise
        features = extract_features(
            model.encoder, dataset.images, normalise, batch_size=config.eval.batch_size, device=device
        )
    scores = evaluate(features, dataset, config.eval) if can_evaluate(config, dataset) else {}
    return Result(method, seed, scores, features)


def save_result(folder: Path, result: Result, config: Config, dataset: ImageDataset) -> None:
    """Write features.npy and evaluation.json; the latter last: where it stands, the member is done."""
    with replacing(folder / FEATURES) as beside:
        np.save(beside, result.features)
    write_evaluation(folder / EVALUATION, [result], config, dataset)


def load_result(folder: Path) -> Result:
    """What `save_result` wrote, with the metrics where there are any."""
    own = read_evaluation(folder / EVALUATION)[0]  # baselines may follow
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    return replace(own, features=np.load(folder / FEATURES), metrics=metrics)


def read_evaluation(file: Path) -> list[Result]:
    """What `write_evaluation` wrote: results without features and metrics."""
    nothing = np.empty((0, 0), dtype=np.float32)
    made = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["results"]:
        scores = {column: Score.from_dict(values) for column, values in entry["scores"].items()}
        made.append(Result(entry["method"], entry["seed"], scores, nothing))
    return made


def write_evaluation(file: Path, results: list[Result], config: Config, dataset: ImageDataset) -> None:
    """All scores as JSON, with the protocol that they follow."""
    content = {
        "data": dataset.name,
        "protocol": protocol(config.eval),
        "results": [
            {
                "method": r.method,
                "seed": r.seed,
                "scores": {column: score.as_dict() for column, score in r.scores.items()},
            }
            for r in results
        ],
    }
    write_text(file, json.dumps(content, indent=2) + "\n")
