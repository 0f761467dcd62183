"""Several methods under several seeds on one budget: trained side by side, then one table and pictures.

Every member (a method under a seed) has its own folder, so a comparison that was killed goes on where it
stood, and one that is asked for again trains nothing anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from wscl_fast.data import ImageDataset
from wscl_fast.files import claimed, replacing, write_text
from wscl_fast.train.config import CompareConfig, Config, replace
from wscl_fast.train.figures import draw_curves, draw_embedding, draw_neighbours
from wscl_fast.train.loop import (
    CHECKPOINT,
    METRICS,
    choose_device,
    images_in_run,
    prepare,
    saved_clustering,
    train,
)
from wscl_fast.train.monitor import Bar, Monitor
from wscl_fast.train.report import caption, methods_of, report, table
from wscl_fast.train.results import Result, judge, load_result, save_result, write_evaluation
from wscl_fast.train.runs import (
    CONFIG,
    CURVES,
    EMBEDDING,
    ENCODER,
    EVALUATION,
    FREE_TO_CHANGE,
    NEIGHBOURS,
    REPORT,
    begin_run,
    check_data,
    clear_run,
    go_on,
    load_data,
    save_encoder,
)
from wscl_fast.train.settings import ConfigError, differences, load_config
from wscl_fast.train.stages import TITLES, auxiliary_methods, data_digest, resolve_training
from wscl_fast.train.workers import run_tasks

BASELINES = ("random", "pixels")
_TO_REPLACE = "replace it with --overwrite, or choose another --name"


@dataclass(frozen=True)
class Member:
    """A method under a seed: where it lives and how it is configured."""

    method: str
    seed: int
    folder: Path
    config: Config

    @property
    def title(self) -> str:
        """For the log."""
        return TITLES[self.method] + ("" if self.method == "pixels" else f", seed {self.seed}")

    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / CONFIG).exists()

    def done(self) -> bool:
        """Whether nothing is left to do of the run that is in the folder: neither trained nor judged anew."""
        judged_so = load_config(self.folder / CONFIG).eval == self.config.eval
        return judged_so and (self.folder / EVALUATION).exists()


def members_of(config: Config, folder: Path, threads: int) -> list[Member]:
    """All members in the order of the table."""
    members = []
    for method in config.compare.methods or ():
        for seed in config.compare.seeds if method != "pixels" else config.compare.seeds[:1]:
            name = method if method == "pixels" else f"{method}-seed{seed}"
            own = replace(
                config,
                **{"name": name, "runs_dir": str(folder), "train.seed": seed, "train.threads": threads},
                **{"compare": CompareConfig(), "cluster.method": "none" if method in BASELINES else method},
            )
            members.append(Member(method, seed, folder / name, own))
    return members


def servable_methods(dataset: ImageDataset) -> tuple[str, ...]:
    """Everything that a data set can be compared on, in the table's order."""
    labels = ("labels",) if dataset.labels else ()
    return (*BASELINES, "none", *auxiliary_methods(dataset), "kmeans", *labels)


def compare(config: Config, folder: Path, dataset: ImageDataset, *, overwrite: bool = False) -> list[Result]:
    """Train and judge every member that is not done yet, print the table, and write the run's files.

    Args:
        config: the budget, and under `compare` the methods and seeds.
        folder: of the comparison.
        dataset: what `config.data` names.
        overwrite: train every member anew, and replace whatever else is in their folders.

    Raises:
        ValueError: no method, no seed, or a method that the data cannot serve; folders that hold other runs,
            or this one on other data, or that another process writes to. Nothing was written then.
    """
    if config.compare.methods is None:
        config = replace(config, **{"compare.methods": servable_methods(dataset)})
    methods = config.compare.methods
    if not methods or not config.compare.seeds:
        raise ValueError("compare.methods and compare.seeds need at least one entry each")
    cores = config.train.threads or os.cpu_count() or 1
    on_cpu = choose_device(config.train.device).type == "cpu"
    workers = config.compare.workers or (cores if on_cpu else 1)
    trained = [m for m in methods if m not in BASELINES]
    workers = max(1, min(workers, len(trained) * len(config.compare.seeds)))
    members = members_of(config, folder, threads=max(1, cores // workers))
    digests = {m: data_digest(dataset, resolve_training(m.config, dataset), "labels") for m in members}
    if not overwrite:
        _check_standing(folder, config, digests)
    kept = [m for m in members if m.begun() and not overwrite]
    _check_settings([m for m in members if m not in kept], dataset)

    with ExitStack() as stack:
        for own in (folder, *(m.folder for m in members)):
            stack.enter_context(claimed(own))
        todo = [m for m in members if m not in kept or not m.done()]
        for member in todo:
            if member in kept:
                (member.folder / EVALUATION).unlink(missing_ok=True)
                go_on(member.folder, member.config)
            else:
                begin_run(member.folder, member.config, digests[member])
        todo.sort(key=lambda m: m.method in BASELINES)  # the long ones first
        if len(todo) < len(members):
            standing = len(members) - len(todo)
            print(f"{standing} of {len(members)} runs stand already (--overwrite does them again)")
        if todo:
            _run(todo, workers, max(1, cores // workers), dataset)
        results = [load_result(m.folder) for m in members]
        if overwrite:
            clear_run(folder)
        go_on(folder, config)
        _write(folder, config, dataset, members, results)
        return results


def _check_standing(folder: Path, config: Config, digests: Mapping[Member, str]) -> None:
    """Refuse to replace what the folders hold."""
    if (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder} holds a single run: {_TO_REPLACE}")
    _check_config(folder, config)
    for member, digest in digests.items():
        _check_config(member.folder, member.config)
        check_data(member.folder, digest)


def _check_config(folder: Path, config: Config) -> None:
    if not (folder / CONFIG).exists():
        return
    try:
        changed = differences(load_config(folder / CONFIG), config)
    except ConfigError as error:
        raise ValueError(f"{folder} holds a run of other settings ({error}): {_TO_REPLACE}") from error
    for key in changed:
        if key not in FREE_TO_CHANGE and not key.startswith("compare."):
            raise ValueError(f"{folder} holds another run ('{key}' differs): {_TO_REPLACE}")


def _check_settings(members: Sequence[Member], dataset: ImageDataset) -> None:
    """Refuse what would stop a member at its start, before any folder is touched."""
    trained = {m.method: m for m in members if m.method not in BASELINES}
    threads = torch.get_num_threads()
    for method, member in trained.items():
        quick = {"cluster.tags.n_clusters": 1, "cluster.method": "none" if method == "kmeans" else method}
        prepare(replace(member.config, **quick), dataset)
    torch.set_num_threads(threads)


def _run(todo: Sequence[Member], workers: int, threads: int, dataset: ImageDataset) -> None:
    to_train = [m for m in todo if m.method not in BASELINES]
    if to_train:
        side = f", {min(workers, len(to_train))} side by side" if workers > 1 else ""
        epochs = to_train[0].config.train.epochs
        print(f"training {len(to_train)} runs of {epochs} epochs{side}", flush=True)
    bar = Bar(quiet_seconds=20.0)
    bar.start(sum(images_in_run(m.config, dataset) for m in to_train), 0)
    try:
        run_tasks(run_member, todo, workers=workers, threads=threads, monitor=_Joint(bar))
    finally:
        bar.stop()


class _Joint:
    """One bar for several runs: a run's own start and stop do not touch it."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def start(self, total: int, done: int) -> None:
        self._bar.advance(done)

    def advance(self, images: int, note: str = "") -> None:
        self._bar.advance(images, note)

    def say(self, line: str) -> None:
        self._bar.say(line)

    def stop(self) -> None:
        pass


def run_member(member: Member, monitor: Monitor) -> str:
    """Train (or resume) and judge one member; returns a line for the log."""
    began = time.perf_counter()
    dataset = load_data(member.config.data)
    model = None
    if member.method not in BASELINES:
        checkpoint = member.folder / CHECKPOINT
        learner = prepare(member.config, dataset, checkpoint if checkpoint.exists() else None)
        model = train(member.config, dataset, member.folder, learner, monitor=monitor)
    result = judge(member.config, dataset, member.method, member.seed, model)
    if model is not None:
        save_encoder(member.folder, model, member.config, member.method)
    save_result(member.folder, result, member.config, dataset)
    scores = "; ".join(
        f"{c} {s.images.linear_top1:.1%} / {s.images.knn_top1:.1%}" for c, s in result.scores.items()
    )
    return f"{member.title}: {scores or 'done'} ({time.perf_counter() - began:.0f} s)"


def _write(
    folder: Path, config: Config, dataset: ImageDataset, members: Sequence[Member], results: Sequence[Result]
) -> None:
    by_method = {m.method: m for m in reversed(members)}  # the first seed of each
    trained = [m for m in methods_of(results) if m not in BASELINES]
    kept = next(
        (m for m in trained if m not in ("none", "labels", "kmeans")), trained[0] if trained else None
    )
    clusterings = [saved_clustering(by_method[m].folder) for m in trained]
    with_metrics = [{"method": r.method, "seed": r.seed, **line} for r in results for line in r.metrics]
    write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in with_metrics))
    write_evaluation(folder / EVALUATION, list(results), config, dataset)
    if kept:
        with replacing(folder / ENCODER) as beside:
            shutil.copyfile(by_method[kept].folder / ENCODER, beside)
    write_pictures(folder, results, dataset)
    title = f"{dataset.name}: what auxiliary information buys"
    encoder_of = by_method[kept].title if kept else ""
    text = report(title, results, config, dataset, clusterings=clusterings, encoder_of=encoder_of)
    write_text(folder / REPORT, text)


def write_pictures(folder: Path, results: Sequence[Result], dataset: ImageDataset) -> None:
    """curves.png, embedding.png and nearest-neighbours.png."""
    draw_curves(folder / CURVES, results)
    draw_embedding(folder / EMBEDDING, results, dataset)
    draw_neighbours(folder / NEIGHBOURS, results, dataset)


def summary(folder: Path, results: Sequence[Result], config: Config, dataset: ImageDataset) -> str:
    """What the command prints at its end."""
    parts = []
    if results[0].scores:
        parts = [table(results), caption(results, config, dataset)]
    return "\n\n".join(
        [*parts, f"written to {folder}/: {REPORT}, {CURVES}, {EMBEDDING}, {NEIGHBOURS}, {ENCODER}"]
    )
