"""What a trained (or an untrained) method came to: its scores, its features, its curve."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wscl_fast.data import Augment, ImageDataset
from wscl_fast.files import replacing, write_text
from wscl_fast.train.checkpoint import read_metrics
from wscl_fast.train.config import Config, replace
from wscl_fast.train.evaluation import Score, evaluate, judged_columns, protocol
from wscl_fast.train.features import Features, extract_features, pixel_features
from wscl_fast.train.loop import METRICS, TrainingError, choose_device
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


def judge(
    config: Config, dataset: ImageDataset, method: str, seed: int, model: ContrastiveModel | None
) -> Result:
    """Features and scores of a trained model, or of the baseline `random` or `pixels`.

    Raises:
        TrainingError: the features are not finite.
    """
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
        if not np.isfinite(features).all():
            raise TrainingError("the encoder's features are not finite: lower optim.lr")
    return Result(method, seed, scores_of(features, config, dataset), features)


def scores_of(features: Features, config: Config, dataset: ImageDataset) -> dict[str, Score]:
    """Scores per label column that there is a test for; none where there is no such column."""
    columns = judged_columns(dataset, config.eval)
    return evaluate(features, dataset, replace(config, **{"eval.labels": columns}).eval)


def save_result(folder: Path, result: Result, config: Config, dataset: ImageDataset) -> None:
    """Write features.npy and evaluation.json; the latter last: where it stands, the member is done."""
    with replacing(folder / FEATURES) as beside:
        np.save(beside, result.features)
    write_evaluation(folder / EVALUATION, [result], config, dataset)


def load_result(folder: Path) -> Result:
    """What `save_result` wrote, with the metrics where there are any."""
    own = read_evaluation(folder / EVALUATION)[0]  # baselines may follow
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    return dataclasses.replace(own, features=np.load(folder / FEATURES), metrics=metrics)


def read_evaluation(file: Path) -> list[Result]:
    """What `write_evaluation` wrote: results without features and metrics.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    return _parsed(file)[1]


def others_there(file: Path, result: Result, config: Config, dataset: ImageDataset) -> list[Result]:
    """The results in `file` of other methods and seeds, where all is judged as `result` was.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    if not file.exists():
        return []
    judged_by, results = _parsed(file)
    if judged_by != (dataset.name, protocol(config.eval)):
        return []
    others = [r for r in results if (r.method, r.seed) != (result.method, result.seed)]
    return [r for r in others if _counts(r) == _counts(result)]


def _parsed(file: Path) -> tuple[tuple[str, str], list[Result]]:
    """(data, protocol) and the results in `file`."""
    nothing = np.empty((0, 0), dtype=np.float32)
    made = []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for entry in content["results"]:
            scores = {column: Score.from_dict(values) for column, values in entry["scores"].items()}
            made.append(Result(entry["method"], entry["seed"], scores, nothing))
        return (content["data"], content["protocol"]), made
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever JSON may be instead
        raise ValueError(
            f"{file} cannot be read as an evaluation: it is damaged, or none of ours; move it away"
        ) from error


def _counts(result: Result) -> dict[str, tuple[int, ...]]:
    return {c: (s.n_classes, s.n_train, s.n_test, s.n_test_groups) for c, s in result.scores.items()}


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
