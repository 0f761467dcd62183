"""The commands' work: each takes a config and files, and prints what it found."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch

from wscl_fast.data import ImageDataset
from wscl_fast.files import claimed, replacing, write_text
from wscl_fast.train.compare import compare, summary, write_pictures
from wscl_fast.train.config import Config
from wscl_fast.train.evaluation import judged_columns
from wscl_fast.train.features import Features, extract_features
from wscl_fast.train.loop import CHECKPOINT, prepare, saved_clustering, train
from wscl_fast.train.monitor import Bar
from wscl_fast.train.report import caption, report, table
from wscl_fast.train.results import (
    Result,
    judge,
    load_result,
    others_there,
    save_result,
    scores_of,
    write_evaluation,
)
from wscl_fast.train.runs import (
    EVALUATION,
    FEATURES,
    FEATURES_TABLE,
    KEYS,
    REPORT,
    Encoder,
    begin_run,
    check_data,
    check_free,
    check_unfinished,
    go_on,
    load_data,
    load_encoder,
    save_encoder,
)
from wscl_fast.train.settings import ConfigError, differences
from wscl_fast.train.stages import (
    TITLES,
    data_digest,
    diagnose_training,
    fit_clusters,
    resolve_method,
    resolve_training,
)
from wscl_fast.train.workers import expect_workers

log = logging.getLogger(__name__)


def run_cluster(config: Config, folder: Path, encoder_run: Path | None) -> None:
    """Stage 1 alone: clusters.csv and clusters.json.

    Raises:
        ConfigError: k-means without the run of an encoder.
    """
    dataset = load_data(config.data)
    method = resolve_method(config.cluster, dataset)
    features = None
    if method == "kmeans":
        if encoder_run is None:
            raise ConfigError("cluster.method 'kmeans' clusters features: name a trained run with --run DIR")
        features = _features(load_encoder(encoder_run, config.train.device), dataset, config)
    clustering = fit_clusters(config.cluster, dataset, method, features=features, seed=config.train.seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = zip(dataset.keys, dataset.split.tolist(), clustering.ids.tolist(), strict=True)
    _write_csv(folder / "clusters.csv", ("key", "split", "cluster"), rows)
    print(f"{TITLES[method]}; fitted on the training split")
    reports = {}
    labels: list[str | None] = [*dataset.labels]
    for label in labels or [None]:
        found = diagnose_training(clustering, dataset, label)
        reports[label or "-"] = found.as_dict()
        print(f"\nT = {label}\n{found}" if label else str(found))
    content = {"method": method, "data": dataset.name, "reports": reports}
    write_text(folder / "clusters.json", json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {folder}/: clusters.csv, clusters.json")


def run_train(config: Config, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Both stages, then the evaluation, the report and the pictures.

    Raises:
        ValueError: the folder holds a run, or files of such names; to be resumed, but on other data than it
            began on, or results without a checkpoint; settings that the data or the model cannot follow;
            or another process writes to it. Nothing was written then.
        TrainingError: a loss, or features in the end, that are not finite.
    """
    dataset = load_data(config.data)
    method = resolve_training(config, dataset)
    chosen = " (chosen by cluster.method auto)" if config.cluster.method == "auto" else ""
    print(f"method: {TITLES[method]}{chosen}", flush=True)
    columns, digest = _judged(config, dataset), data_digest(dataset, method)
    if resume:
        check_data(folder, digest)
    elif not overwrite:
        check_free(folder)
    stands = resume and (folder / CHECKPOINT).exists()  # else it was killed before it got anywhere
    if resume and not stands:
        check_unfinished(folder)
    learner = prepare(config, dataset, folder / CHECKPOINT if stands else None)
    with claimed(folder):
        if resume:
            go_on(folder, config)
        else:
            begin_run(folder, config, digest)
        model = train(config, dataset, folder, learner, monitor=Bar())
        seed = config.train.seed
        result = judge(config, dataset, method, seed, model)
        save_encoder(folder, model, config, method)
        save_result(folder, result, config, dataset)
        results = [load_result(folder)]
        if columns:
            results = [
                judge(config, dataset, baseline, seed, None) for baseline in ("random", "pixels")
            ] + results
            write_evaluation(folder / EVALUATION, results[::-1], config, dataset)
        write_pictures(folder, results, dataset)
        title = f"{dataset.name}: {TITLES[method]}"
        text = report(
            title, results, config, dataset, clusterings=[saved_clustering(folder)], encoder_of=TITLES[method]
        )
        write_text(folder / REPORT, text)
        print("\n" + summary(folder, results, config, dataset))


def _judged(config: Config, dataset: ImageDataset) -> tuple[str, ...]:
    """The label columns that are evaluated; says which are not."""
    columns = judged_columns(dataset, config.eval)
    asked = config.eval.labels if config.eval.labels is not None else tuple(dataset.labels)
    if not columns:
        print("no labelled test images: not evaluated")
    for column in asked if columns else ():
        if column not in columns:
            print(f"label column '{column}' has no labelled training and test images: not evaluated")
    return columns


def run_compare(config: Config, folder: Path, *, overwrite: bool) -> None:
    """All methods under all seeds, one table."""
    if config.compare.workers != 1 and (os.cpu_count() or 1) > 1:
        expect_workers("wscl_fast.train.compare", "torch._dynamo")  # which torch.optim imports when it begins
    dataset = load_data(config.data)
    _judged(config, dataset)
    results = compare(config, folder, dataset, overwrite=overwrite)
    print("\n" + summary(folder, results, config, dataset))


def run_evaluate(config: Config, folder: Path) -> None:
    """Judge a trained encoder again, on the data of `config`."""
    encoder = _encoder(folder, config)
    dataset = load_data(config.data)
    if not judged_columns(dataset, config.eval):
        raise ConfigError(f"'{dataset.name}' has no labelled test images to evaluate on")
    _judged(config, dataset)
    features = _features(encoder, dataset, config)
    method = encoder.method or resolve_method(config.cluster, dataset)
    result = Result(method, encoder.seed, scores_of(features, config, dataset), features)
    others = others_there(folder / EVALUATION, result, config, dataset)
    write_evaluation(folder / EVALUATION, [result, *others], config, dataset)
    print(f"\n{table([result])}\n\n{caption([result], config, dataset)}")
    for column, score in result.scores.items():
        print(f"top-5 {column}: linear {score.images.linear_top5:.1%}, k-NN {score.images.knn_top5:.1%}")
    content = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    print(f"protocol: {content['protocol']}\nwritten to {folder / EVALUATION}")


def run_embed(config: Config, folder: Path, out: Path, kind: str) -> None:
    """Features of every image of the data of `config`: features.npy and keys.csv, or one features.parquet."""
    encoder = _encoder(folder, config)
    dataset = load_data(config.data)
    features = _features(encoder, dataset, config)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        import polars as pl

        columns = {"key": dataset.keys, "split": dataset.split.tolist()}
        frame = pl.DataFrame(columns).with_columns(
            pl.Series("features", features, dtype=pl.Array(pl.Float32, features.shape[1]))
        )
        with replacing(out / FEATURES_TABLE) as beside:
            frame.write_parquet(beside)
        written = FEATURES_TABLE
    else:
        with replacing(out / FEATURES) as beside:
            np.save(beside, features)
        _write_csv(out / KEYS, ("key", "split"), zip(dataset.keys, dataset.split.tolist(), strict=True))
        written = f"{FEATURES}, {KEYS}"
    print(f"{features.shape[0]:,} images, {features.shape[1]} features each; written to {out}/: {written}")


def _encoder(folder: Path, config: Config) -> Encoder:
    """The encoder of the run in `folder`, where `config` wants it.

    Raises:
        ConfigError: `config` asks for another encoder.
    """
    encoder = load_encoder(folder, config.train.device)
    for key in differences(encoder.config, config):
        if key.startswith(("model.", "augment.")):
            raise ConfigError(f"'{key}' differs from what the encoder of {folder} was trained with")
    return encoder


def _features(encoder: Encoder, dataset: ImageDataset, config: Config) -> Features:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    size = encoder.config.data.image_size
    if dataset.images.shape[-1] != size:
        raise ConfigError(f"data.image_size is {dataset.images.shape[-1]}: the encoder was trained at {size}")
    return extract_features(
        encoder.module,
        dataset.images,
        encoder.normalise,
        batch_size=config.eval.batch_size,
        device=encoder.device,
    )


def _write_csv(file: Path, header: tuple[str, ...], rows: object) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)  # type: ignore[arg-type]
    write_text(file, stream.getvalue())
