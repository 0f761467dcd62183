"""Every setting of a run, as dataclasses: the one place that says what exists, of what type, and its default.

`settings.py` reads and writes them; `wscl-fast train --help` prints the help texts below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from wscl_fast.data import AugmentConfig
from wscl_fast.data.emoji import FOLDS

T = TypeVar("T")

MAX_SEED = 2**63 - 1
MAX_FLOAT = float(np.finfo(np.float32).max)  # what weights and logits are made of
MAX_THREADS = 4096  # more than machines have; OpenMP ends the process where it cannot start as many

Contender = Literal["random", "pixels", "none", "tags", "attributes", "hierarchy", "ids", "labels", "kmeans"]


def setting(default: T, help: str, *, minimum: float | None = None, maximum: float | None = None) -> T:
    """A dataclass field with a help text and an allowed range (both inclusive)."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    made: Any = field(default=default, metadata=metadata)  # field() lies about its type; so do we
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and which columns of their table say what."""

    folder: str | None = setting(None, "folder of images; unset: the OpenMoji pictures")
    table: str | None = setting(None, "CSV or Parquet, one row per image of the folder")
    image_size: int = setting(32, "side of the square images, in pixels", minimum=8, maximum=1024)
    fold: int = setting(
        FOLDS - 1,
        "which fifth of the emoji is the test split (of the OpenMoji pictures)",
        minimum=0,
        maximum=FOLDS - 1,
    )
    on_error: Literal["raise", "skip"] = setting(
        "raise", "what to do with a bad row: stop, or count and go on"
    )
    path_column: str = setting("path", "column with the image's path, relative to the folder")
    split_column: str = setting("split", "column with train, val or test")
    label_columns: tuple[str, ...] | None = setting(
        None, "columns with labels, for evaluation; unset: label, if it has any"
    )
    tag_column: str | None = setting(None, "column with tags; unset: tags or hashtags, if it has any")
    attribute_columns: tuple[str, ...] = setting((), "columns with discrete attributes")
    hierarchy_columns: tuple[str, ...] = setting((), "columns of a hierarchy, from the root down")
    cluster_column: str | None = setting(
        None, "column with cluster ids made elsewhere, -1: none; unset: cluster, if no row lacks one"
    )
    cache_dir: str | None = setting(None, "where decoded images are kept; unset: ~/.cache/wscl-fast")


@dataclass(frozen=True)
class TagsConfig:
    """k-means on the TF-IDF vectors of the tags."""

    n_clusters: int = setting(150, "number of clusters", minimum=1)
    min_count: int = setting(2, "forget tags that fewer training samples carry", minimum=1)


@dataclass(frozen=True)
class AttributesConfig:
    """The joint value of the most informative attributes."""

    top_k: int | None = setting(None, "use the k attributes of highest entropy; unset: all", minimum=1)


@dataclass(frozen=True)
class HierarchyConfig:
    """The path in a hierarchy, cut."""

    level: int = setting(1, "depth of the cut, counted from the root", minimum=1)


@dataclass(frozen=True)
class LabelsConfig:
    """The labels as clusters: SupCon, the ceiling."""

    columns: tuple[str, ...] | None = setting(
        None, "label columns, the coarsest first, each an equal part of the loss; unset: the first"
    )


@dataclass(frozen=True)
class KMeansConfig:
    """k-means on the features that are being learned."""

    n_clusters: int = setting(150, "number of clusters", minimum=1)
    metric: Literal["euclidean", "cosine"] = setting("cosine", "distance of the features")
    warmup_epochs: int = setting(
        5, "epochs with every sample its own cluster before the first k-means", minimum=0
    )
    every: int = setting(3, "epochs between two clusterings", minimum=1)
    stable_ids: bool = setting(True, "start from the last clusters, which keep their ids")
    momentum: float = setting(
        0.0,
        "cluster features of a moving average of the encoder, of this much a step; 0: its own",
        minimum=0.0,
        maximum=0.99999,
    )


@dataclass(frozen=True)
class ClusterConfig:
    """Stage 1: what makes two samples belong together."""

    method: Literal["auto", "none", "tags", "attributes", "hierarchy", "ids", "labels", "kmeans"] = setting(
        "auto", "source of the clusters; auto: what the data has (tags first), else kmeans"
    )
    tags: TagsConfig = field(default_factory=TagsConfig)
    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, which is kept, and the projection head, which is thrown away."""

    encoder: str = setting("resnet-small", "resnet-small, resnet18, 34 or 50, torchvision:NAME, timm:NAME")
    widths: tuple[int, ...] | None = setting(None, "channels of each stage of our ResNets; unset: the usual")
    depths: tuple[int, ...] | None = setting(None, "blocks in each stage of our ResNets; unset: the usual")
    stem: Literal["auto", "3x3", "3x3/2", "3x3/4", "7x7/4"] = setting(
        "auto", "kernel of the first convolutions / how much they shrink the image; auto: by image size"
    )
    pool: int = setting(
        1, "n: our ResNets' features are the averages over n × n parts of the image", minimum=1
    )
    head_hidden: int = setting(256, "hidden width of the projection head", minimum=1)
    head_layers: int = setting(2, "linear layers of the projection head; 0: none", minimum=0)
    head_dim: int = setting(128, "size of the projected features", minimum=2)


@dataclass(frozen=True)
class LossConfig:
    """Cl-InfoNCE."""

    temperature: float = setting(
        0.1, "temperature (its start, when learnable)", minimum=1e-4, maximum=MAX_FLOAT
    )
    learnable_temperature: bool = setting(False, "learn the temperature")
    positives: Literal["out", "in"] = setting("out", "average over positives outside or inside the logarithm")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule: linear warm-up, then cosine to zero."""

    name: Literal["sgd", "adamw", "lars"] = setting("adamw", "optimiser")
    lr: float = setting(3e-3, "highest learning rate", minimum=0.0, maximum=MAX_FLOAT)
    weight_decay: float = setting(
        1e-4, "weight decay; never on biases and normalisation", minimum=0.0, maximum=MAX_FLOAT
    )
    momentum: float = setting(0.9, "momentum of SGD and LARS", minimum=0.0, maximum=1.0)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up", minimum=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2: how long, on what, and how often things are written."""

    epochs: int = setting(30, "passes over the training split", minimum=1)
    batch_size: int = setting(128, "images in a batch", minimum=2)
    samples_per_cluster: int = setting(
        4, "images of one cluster drawn together; 1: uniform batches", minimum=1
    )
    seed: int = setting(0, "seed of everything random", minimum=0, maximum=MAX_SEED)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 ...")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "type of convolutions and products; auto: bfloat16 where the hardware has it"
    )
    threads: int | None = setting(None, "CPU threads; unset: all cores", minimum=1, maximum=MAX_THREADS)
    log_every: int = setting(10, "steps between two loss lines in metrics.jsonl", minimum=1)
    checkpoint_seconds: float = setting(
        60.0, "write a checkpoint this often within an epoch too", minimum=0.0
    )


@dataclass(frozen=True)
class EvalConfig:
    """The frozen encoder, judged."""

    labels: tuple[str, ...] | None = setting(None, "label columns to evaluate; unset: all")
    knn_k: int = setting(20, "neighbours that vote", minimum=1)
    knn_temperature: float = setting(0.07, "temperature of their votes", minimum=1e-4)
    held_out: float = setting(
        0.2, "share of the training split that picks the probe's weight decay", minimum=0.01, maximum=0.9
    )
    batch_size: int = setting(512, "images in a batch of the forward passes", minimum=1)


@dataclass(frozen=True)
class CompareConfig:
    """Several methods under one budget."""

    methods: tuple[Contender, ...] | None = setting(
        None, "what to compare, in the table's order; unset: all that the data can serve"
    )
    seeds: tuple[int, ...] = setting((0, 1), "seeds of each method")
    workers: int | None = setting(None, "runs trained side by side; unset: one per core", minimum=1)

    def __post_init__(self) -> None:
        for name, values in (("methods", self.methods or ()), ("seeds", self.seeds)):
            twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} must differ from each other, got {twice[0]} more than once")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seeds must be from 0 to {MAX_SEED}, got {seed}")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = setting("", "name of the run; unset: the command's")
    runs_dir: str = setting("runs", "folder of all runs")
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


def replace(config: Config, **changes: Any) -> Config:
    """A copy of `config` with dotted settings changed: `replace(c, **{"train.seed": 1})`."""
    for path, value in changes.items():
        config = _replaced(config, path.split("."), value)
    return config


def _replaced(config: Any, keys: list[str], value: Any) -> Any:
    inner = value if len(keys) == 1 else _replaced(getattr(config, keys[0]), keys[1:], value)
    return dataclasses.replace(config, **{keys[0]: inner})
