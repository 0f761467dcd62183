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
from wscl_fast.files import remove_leftovers, replacing, write_text
from wscl_fast.train.config import Config, DataConfig
from wscl_fast.train.loop import CHECKPOINT, METRICS, choose_device
from wscl_fast.train.model import ContrastiveModel, make_encoder, weights_of
from wscl_fast.train.settings import ConfigError, differences, dump_config, load_config, save_config

CONFIG = "config.yaml"
DATA = "data.digest"
ENCODER = "encoder.safetensors"
FEATURES = "features.npy"
FEATURES_TABLE = "features.parquet"
KEYS = "keys.csv"
EVALUATION = "evaluation.json"
REPORT = "report.md"
CURVES = "curves.png"
EMBEDDING = "embedding.png"
NEIGHBOURS = "nearest-neighbours.png"
RUN_FILES = (
    CONFIG,
    DATA,
    METRICS,
    CHECKPOINT,
    ENCODER,
    FEATURES,
    FEATURES_TABLE,
    KEYS,
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
    "eval.labels",
    "eval.knn_k",
    "eval.knn_temperature",
    "eval.held_out",
)

log = logging.getLogger(__name__)


def check_free(folder: Path) -> None:
    """Refuse to take a folder that is another run's, or that has files where a run writes its own.

    Raises:
        ValueError: the folder holds a run, or a file of the name of a run's.
    """
    if (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume, replace it with --overwrite, "
            "or choose another --name"
        )
    for name in RUN_FILES:
        if name != DATA and (folder / name).exists():  # the digest alone is a run killed as it began
            raise ValueError(
                f"{folder} is no run's but has a {name}, which a run would replace: allow it with "
                "--overwrite, or choose another --name"
            )


def check_unfinished(folder: Path) -> None:
    """Refuse to begin anew, in the name of going on, where results stand without a checkpoint.

    Raises:
        ValueError: the folder of a comparison, or of a run that finished and lost its checkpoint.
    """
    for name in (ENCODER, EVALUATION, REPORT):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} has results ({name}) but no {CHECKPOINT} to resume from: a comparison goes on "
                "with wscl-fast compare, a run is done again with --overwrite"
            )


def begin_run(folder: Path, config: Config, digest: str) -> None:
    """Make the folder, without what an earlier run left, and write its config and the digest of its data."""
    clear_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DATA, digest + "\n")
    save_config(config, folder / CONFIG)


def check_data(folder: Path, digest: str) -> None:
    """Refuse to go on with a run on other data than it began on; a run without a digest passes.

    Raises:
        ValueError: the digest is not that of the run in `folder`.
    """
    file = folder / DATA
    if file.exists() and file.read_text(encoding="utf-8").strip() != digest:
        raise ValueError(
            f"the data changed since {folder} began (its images, their split, or what is known about them): "
            "put the table back, replace the run with --overwrite, or choose another --name"
        )


def clear_run(folder: Path) -> None:
    """Remove the files of a run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    clear_leftovers(folder)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written of a run's files, which lies beside them."""
    for name in RUN_FILES:
        remove_leftovers(folder / name)


def go_on(folder: Path, config: Config) -> None:
    """Write the config of a run that is continued, without what was half-written as it was killed."""
    clear_leftovers(folder)
    save_config(config, folder / CONFIG)


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
    rows = Table(Path(config.table))
    return load_folder(
        config.folder,
        config.table,
        image_size=config.image_size,
        cache_dir=cache_folder(config),
        on_error=config.on_error,
        path_column=config.path_column,
        split_column=config.split_column,
        label_columns=config.label_columns,
        tag_column=config.tag_column or _conventional(rows, "tag", ("tags", "hashtags")),
        attribute_columns=config.attribute_columns,
        hierarchy_columns=config.hierarchy_columns,
        cluster_column=config.cluster_column
        or _conventional(rows, "cluster", ("cluster",), in_every_row=True),
    )


def _conventional(
    rows: Table, role: str, usual: tuple[str, ...], *, in_every_row: bool = False
) -> str | None:
    """The first column of a usual name that has values, in every row where the role needs them there."""
    for name in usual:
        if rows.serves(name, in_every_row=in_every_row):
            log.info("column '%s' is taken as the %s column", name, role)
            return name
        if name in rows.names:
            log.info("column '%s' is not taken as the %s column: it lacks values", name, role)
    return None


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, ready to use."""

    module: nn.Module
    normalise: Callable[[Tensor], Tensor]
    config: Config
    device: torch.device
    method: str | None  # that trained it; None where its file does not say
    seed: int


def save_encoder(folder: Path, model: ContrastiveModel, config: Config, method: str) -> None:
    """Write the encoder with the config that rebuilds it, and the method that trained it."""
    notes = {"config": dump_config(config), "method": method, "seed": str(config.train.seed)}
    with replacing(folder / ENCODER) as beside:
        safetensors.torch.save_file(weights_of(model.encoder), beside, metadata=notes)


def load_encoder(folder: Path, device_name: str | None = None) -> Encoder:
    """The encoder of the run in `folder`, in eval mode.

    Args:
        folder: of a finished run.
        device_name: as `train.device`; None: the run's.

    Raises:
        FileNotFoundError: no run there, or one that has not finished.
        ValueError: the encoder's file is damaged, or of another model than the run's config says.
    """
    config = load_config(folder / CONFIG) if (folder / CONFIG).exists() else None
    if config is None:
        raise FileNotFoundError(f"no run at {folder}")
    if not (folder / ENCODER).exists():
        raise FileNotFoundError(f"the run at {folder} has no {ENCODER} yet: finish it with train --resume")
    device = choose_device(device_name or config.train.device)
    module, _ = make_encoder(config.model, config.data.image_size)
    try:
        with safetensors.safe_open(folder / ENCODER, framework="pt") as opened:
            notes = opened.metadata() or {}
        module.load_state_dict(safetensors.torch.load_file(folder / ENCODER))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / ENCODER} cannot be read: it is damaged, or not of the model.* and data.image_size "
            f"in {CONFIG}"
        ) from error
    module = module.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    normalise, seed = Augment(config.augment).normalise, int(notes.get("seed", config.train.seed))
    return Encoder(module, normalise, config, device, notes.get("method"), seed)
