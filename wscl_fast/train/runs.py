"""The folder of a run: what lies in it, how it is begun, resumed, and read again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from wscl_fast.data import Augment, ImageDataset, load_folder, load_openmoji
from wscl_fast.data.table import Table
from wscl_fast.files import replacing
from wscl_fast.train.config import Config, DataConfig
from wscl_fast.train.loop import CHECKPOINT, METRICS, choose_device
from wscl_fast.train.model import ContrastiveModel, make_encoder, weights_of
from wscl_fast.train.settings import ConfigError, differences, load_config, save_config

CONFIG = "config.yaml"
ENCODER = "encoder.safetensors"
FEATURES = "features.npy"
EVALUATION = "evaluation.json"
REPORT = "report.md"
CURVES = "curves.png"
EMBEDDING = "embedding.png"
NEIGHBOURS = "nearest-neighbours.png"
RUN_FILES = (
    CONFIG,
    METRICS,
    CHECKPOINT,
    ENCODER,
    FEATURES,
    EVALUATION,
    REPORT,
    CURVES,
    EMBEDDING,
    NEIGHBOURS,
)

# What may change between a run and its continuation: nothing that a loss depends on.
FREE_TO_CHANGE = (
    "name",
    "runs_dir",
    "data.cache_dir",
    "train.checkpoint_seconds",
    "train.device",
    "train.threads",
)

log = logging.getLogger(__name__)


def begin_run(folder: Path, config: Config, *, overwrite: bool) -> None:
    """Make the folder and write its config; an earlier run there is only replaced when told to.

    Raises:
        ValueError: the folder holds a run.
    """
    if (folder / CONFIG).exists() and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume, replace it with --overwrite, "
            "or choose another --name"
        )
    clear_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG)


def clear_run(folder: Path) -> None:
    """Remove the files of a run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def resumed_config(folder: Path, wanted: Callable[[Path], Config]) -> Config:
    """The config of the run in `folder`, to be continued.

    Args:
        folder: of the run.
        wanted: from the file of the run's config to what the caller asks for.

    Raises:
        FileNotFoundError: no run there.
        ConfigError: the caller asks for something that would make it another run.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"no run at {folder}: nothing to resume")
    stored = load_config(folder / CONFIG)
    asked = wanted(folder / CONFIG)
    for key in differences(stored, asked):
        if key not in FREE_TO_CHANGE:
            raise ConfigError(f"--resume continues {folder} as it was configured: '{key}' differs")
    return asked


def load_data(config: DataConfig) -> ImageDataset:
    """The data set of `config`; its licence and what was found are logged."""
    dataset = _own_data(config) if config.folder or config.table else _openmoji(config)
    counts = ", ".join(f"{len(dataset.indices(s)):,} {s}" for s in ("train", "val", "test"))
    skipped = f"; {dataset.n_skipped} skipped" if dataset.n_skipped else ""
    log.info("%s: %s images of %d × %d%s", dataset.name, counts, *dataset.images.shape[2:], skipped)
    return dataset


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, else wscl-fast's folder in the user's cache."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wscl-fast"


def _openmoji(config: DataConfig) -> ImageDataset:
    return load_openmoji(cache_folder(config), config.image_size, config.fold)


def _own_data(config: DataConfig) -> ImageDataset:
    for name in ("folder", "table"):
        if getattr(config, name) is None:
            raise ConfigError(f"data.{name} is missing: own images need --data.folder and --data.table")
    assert config.folder is not None
    assert config.table is not None
    names = Table(Path(config.table)).names
    return load_folder(
        config.folder,
        config.table,
        image_size=config.image_size,
        cache_dir=cache_folder(config),
        on_error=config.on_error,
        path_column=config.path_column,
        split_column=config.split_column,
        label_columns=config.label_columns,
        tag_column=config.tag_column or _conventional(names, "tag", ("tags", "hashtags")),
        attribute_columns=config.attribute_columns,
        hierarchy_columns=config.hierarchy_columns,
        cluster_column=config.cluster_column or _conventional(names, "cluster", ("cluster",)),
    )


def _conventional(names: list[str], role: str, usual: tuple[str, ...]) -> str | None:
    found = next((name for name in usual if name in names), None)
    if found:
        log.info("column '%s' is taken as the %s column", found, role)
    return found


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, ready to use."""

    module: nn.Module
    normalise: Callable[[Tensor], Tensor]
    config: Config
    device: torch.device


def save_encoder(folder: Path, model: ContrastiveModel, config_text: str) -> None:
    """Write the encoder with the config that rebuilds it."""
    with replacing(folder / ENCODER) as beside:
        safetensors.torch.save_file(weights_of(model.encoder), beside, metadata={"config": config_text})


def load_encoder(folder: Path) -> Encoder:
    """The encoder of the run in `folder`, in eval mode.

    Raises:
        FileNotFoundError: no run there, or one that has not finished.
    """
    config = load_config(folder / CONFIG) if (folder / CONFIG).exists() else None
    if config is None:
        raise FileNotFoundError(f"no run at {folder}")
    if not (folder / ENCODER).exists():
        raise FileNotFoundError(f"the run at {folder} has no {ENCODER} yet: finish it with train --resume")
    device = choose_device(config.train.device)
    module, _ = make_encoder(config.model, config.data.image_size)
    module.load_state_dict(safetensors.torch.load_file(folder / ENCODER))
    module = module.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Encoder(module, Augment(config.augment).normalise, config, device)
