"""Stage 2: the training loop, from uint8 images to a trained encoder.

Everything random in a step follows from (seed, epoch, step), so that a run that was killed and resumed
takes the very steps of one that was not.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wscl_fast import ClusteredInfoNCE, HierarchicalInfoNCE
from wscl_fast.data import Augment, ClusterBatchSampler, ImageDataset, anchor_share
from wscl_fast.train.checkpoint import MetricsLog, Position, load_checkpoint, save_checkpoint
from wscl_fast.train.config import Config
from wscl_fast.train.features import Features, extract_features
from wscl_fast.train.model import ContrastiveModel, make_model
from wscl_fast.train.monitor import Monitor, Silent
from wscl_fast.train.optim import learning_rate, make_optimizer, set_learning_rate
from wscl_fast.train.stages import (
    TITLES,
    Clustering,
    clusters_for_epoch,
    diagnose_training,
    is_due,
    resolve_training,
    training_ids,
)

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Learner:
    """What has to survive a kill: weights, optimiser, clusters, and where the run stands."""

    def __init__(self, config: Config, image_size: int, device: torch.device) -> None:
        self.model = make_model(config.model, image_size, seed=config.train.seed).to(device)
        columns = config.cluster.labels.columns or ()
        levels = config.cluster.method == "labels" and len(columns) > 1
        self.loss_fn = (HierarchicalInfoNCE if levels else ClusteredInfoNCE)(
            temperature=config.loss.temperature,
            learnable_temperature=config.loss.learnable_temperature,
            positives=config.loss.positives,
        ).to(device)
        self.optimizer = make_optimizer([self.model, self.loss_fn], config.optim)
        self.clustering: Clustering | None = None
        momentum = config.cluster.kmeans.momentum
        self.average: AveragedModel | None = None
        if config.cluster.method in ("auto", "kmeans") and momentum:
            rule = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model.encoder, multi_avg_fn=rule, use_buffers=True)
        self.position = Position()
        self.threads = torch.get_num_threads()  # of the checkpoint, where one was loaded

    def save(self, file: Path) -> None:
        """Write a checkpoint."""
        parts = {
            "model": self.model.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clustering": vars(self.clustering) if self.clustering else None,
            "average": self.average.state_dict() if self.average else None,
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(file, self.position, parts)

    def load(self, file: Path) -> None:
        """Continue from a checkpoint."""
        self.position, parts = load_checkpoint(file)
        self.model.load_state_dict(parts["model"])
        self.loss_fn.load_state_dict(parts["loss"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.clustering = _restored_clustering(parts["clustering"])
        if self.average:
            self.average.load_state_dict(parts["average"])
        self.threads = int(parts["threads"])

    def step(self, views: Tensor, clusters: Tensor, *, lr: float, bfloat16: bool) -> Tensor:
        """One step of the optimiser on views [B, V, 3, H, W] with ids [B, levels]; returns the loss."""
        set_learning_rate(self.optimizer, lr)
        flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.model(flat)
        features = features.float().unflatten(0, views.shape[:2])  # [B, V, d]
        loss: Tensor = self.loss_fn(features, clusters if clusters.shape[1] > 1 else clusters[:, 0])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model.encoder)
        return loss.detach()


def prepare(config: Config, dataset: ImageDataset, checkpoint: Path | None = None) -> Learner:
    """A learner with its first clusters, or one that stands where a checkpoint does; nothing is written.

    Args:
        config: the run's settings.
        dataset: images with their auxiliary information.
        checkpoint: to continue from.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: too few images, an encoder or a clustering that cannot be, a broken checkpoint.
    """
    settings, n = config.train, len(dataset.indices("train"))
    method = resolve_training(config, dataset)
    if n < 2:
        raise ValueError(f"'{dataset.name}' has {n} training images: at least 2 are needed")
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    learner = Learner(config, dataset.images.shape[-1], device)
    if checkpoint:
        learner.load(checkpoint)
    else:
        learner.clustering = _clusters(config, dataset, learner, method, 0)
    return learner


def _clusters(config: Config, dataset: ImageDataset, learner: Learner, method: str, epoch: int) -> Clustering:
    def features() -> Features:
        return extract_features(
            learner.average.module if learner.average else learner.model.encoder,
            dataset.images,
            Augment(config.augment).normalise,
            batch_size=config.eval.batch_size,
            device=choose_device(config.train.device),
        )

    seed = mix(config.train.seed, epoch)
    return clusters_for_epoch(
        config.cluster, dataset, method, epoch, features=features, seed=seed, previous=learner.clustering
    )


def train(
    config: Config, dataset: ImageDataset, folder: Path, learner: Learner, *, monitor: Monitor | None = None
) -> ContrastiveModel:
    """Train on the training split of `dataset`; checkpoints and metrics.jsonl go to `folder`.

    Args:
        config: the run's settings.
        dataset: images with their auxiliary information.
        folder: an existing folder.
        learner: as `prepare` gave it for this config and data set.
        monitor: shown the progress.

    Returns:
        The trained model, on its device, in eval mode.

    Raises:
        TrainingError: the loss is not finite any more.
        ValueError: a clustering the data cannot give.
    """
    settings, monitor = config.train, monitor or Silent()
    method = resolve_training(config, dataset)
    rows = dataset.indices("train")
    batch_size = min(settings.batch_size, len(rows))
    device = choose_device(settings.device)
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and has_bfloat16(device))
    if learner.threads != torch.get_num_threads():
        monitor.say(
            f"resumed on {torch.get_num_threads()} threads, begun on {learner.threads}: last bits may differ"
        )
    position = learner.position
    metrics = MetricsLog(folder / METRICS, position.metrics_bytes)
    augment = Augment(config.augment)
    generator = torch.Generator(device=device)

    steps = len(rows) // batch_size
    done = position.epoch * steps + position.step
    monitor.start(images_in_run(config, dataset), done * batch_size)
    saved_at = time.monotonic()
    try:
        for epoch in range(position.epoch, settings.epochs):
            if position.step == 0 and is_due(config.cluster, method, epoch):
                if epoch > 0:
                    learner.clustering = _clusters(config, dataset, learner, method, epoch)
                found = learner.clustering
                assert found is not None
                report = diagnose_training(found, dataset)
                metrics.write(
                    "clusters",
                    epoch=epoch,
                    method=found.method,
                    moved=found.moved,
                    nmi=found.nmi,
                    **_scalars(report.as_dict()),
                )
                since = "" if found.moved is None else f", {found.moved:.0%} of the samples in another one"
                monitor.say(f"epoch {epoch + 1}: {TITLES[found.method]}: {report.n_clusters} clusters{since}")
            assert learner.clustering is not None
            ids = training_ids(learner.clustering, dataset)
            finest = ids[:, -1]
            sampler = ClusterBatchSampler(
                finest,
                batch_size,
                samples_per_cluster=min(settings.samples_per_cluster, batch_size),
                seed=settings.seed,
            )
            batches = itertools.islice(sampler.batches(epoch), position.step, None)
            learner.model.train()
            pending: list[Tensor] = []  # losses that were not fetched yet: fetching waits for the device
            began, began_step = time.perf_counter(), position.step
            for picked, images in prefetch(dataset.images, rows, batches):
                seed = mix(settings.seed, epoch, position.step)
                torch.manual_seed(seed)
                generator.manual_seed(seed)
                lr = learning_rate(config.optim, epoch + (position.step + 0.5) / steps, settings.epochs)
                views = augment(images.to(device), generator=generator)  # [B, V, 3, H, W]
                clusters = torch.from_numpy(ids[picked]).to(device)
                pending.append(learner.step(views, clusters, lr=lr, bfloat16=bfloat16))
                position.step += 1
                position.shares.append(anchor_share(finest[picked]))

                log_due = position.step % settings.log_every == 0 or position.step == steps
                save_due = time.monotonic() - saved_at >= settings.checkpoint_seconds
                if log_due or save_due:
                    _fetch(pending, position, lr)
                if log_due:
                    metrics.write("step", epoch=epoch, step=position.step, loss=position.losses[-1], lr=lr)
                if save_due and position.step < steps:
                    position.metrics_bytes = metrics.bytes
                    learner.save(folder / CHECKPOINT)
                    saved_at = time.monotonic()
                monitor.advance(batch_size, _note(position, settings.epochs))

            seconds = time.perf_counter() - began
            summary = {
                "loss": float(np.mean(position.losses)),
                "anchors_with_positive": float(np.mean(position.shares)),
                "lr": lr,
                "temperature": float(torch.as_tensor(learner.loss_fn.temperature).detach()),
                "images_per_second": round((steps - began_step) * batch_size / seconds, 1),
                "seconds": round(seconds, 3),
            }
            metrics.write("epoch", epoch=epoch, **summary)
            monitor.say(_epoch_line(epoch, settings.epochs, summary))
            position.next_epoch(metrics.bytes)
            learner.save(folder / CHECKPOINT)
            saved_at = time.monotonic()
    finally:
        metrics.close()
        monitor.stop()
    return learner.model.eval()


def images_in_run(config: Config, dataset: ImageDataset) -> int:
    """Images that a whole run takes in, each counted once per epoch."""
    n = len(dataset.indices("train"))
    batch_size = min(config.train.batch_size, n)
    return config.train.epochs * (n // batch_size) * batch_size


def saved_clustering(folder: Path) -> Clustering:
    """The clusters that the run in `folder` stood on last."""
    _, parts = load_checkpoint(folder / CHECKPOINT)
    clustering = _restored_clustering(parts["clustering"])
    assert clustering is not None
    return clustering


def prefetch(
    images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], batches: Iterator[npt.NDArray[np.int64]]
) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
    """(positions, their images) batch by batch, the next one read from disk while this one is used."""

    def read(picked: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Tensor]:
        return picked, torch.from_numpy(images[rows[picked]])

    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for picked in batches:
            coming = reader.submit(read, picked)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()


def _fetch(pending: list[Tensor], position: Position, lr: float) -> None:
    """Bring the pending losses to the host, and stop on one that is not finite."""
    first = len(position.losses)
    position.losses += torch.stack(pending).tolist()
    pending.clear()
    for step, loss in enumerate(position.losses[first:], start=first):
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} in epoch {position.epoch + 1}, step {step + 1} (lr {lr:.3g}): "
                "lower optim.lr or raise loss.temperature"
            )


def _note(position: Position, epochs: int) -> str:
    loss = f", loss {position.losses[-1]:.3f}" if position.losses else ""
    return f"epoch {position.epoch + 1}/{epochs}{loss}"


def _epoch_line(epoch: int, epochs: int, summary: dict[str, float]) -> str:
    return (
        f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}  loss {summary['loss']:.4f}  "
        f"anchors with a positive from another sample {summary['anchors_with_positive']:.0%}  "
        f"{summary['images_per_second']:,.0f} images/s"
    )


def _scalars(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if value is None or isinstance(value, int | float)}


def _restored_clustering(saved: dict[str, Any] | None) -> Clustering | None:
    if saved is None:
        return None
    known = _to_arrays({name: saved[name] for name in ("method", "ids", "state")})
    return Clustering(**known, **_to_arrays({name: saved.get(name) for name in ("coarser", "moved", "nmi")}))


def _to_arrays(state: Any) -> Any:
    """Tensors as arrays, as the clustering methods keep their state."""
    if isinstance(state, dict):
        return {name: _to_arrays(value) for name, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def choose_device(name: str) -> torch.device:
    """The device of `train.device`; "auto" is the GPU where there is one.

    Raises:
        ValueError: no such device, or not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device '{name}' is no device: choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device '{name}' is not supported: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device '{name}': no GPU is available to this PyTorch ({torch.__version__})")
    return device
