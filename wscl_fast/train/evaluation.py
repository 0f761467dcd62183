"""How good frozen features are: a linear probe and a k-NN vote, top-1 and top-5 on the test split.

Both look at the training split alone; the test split is touched once, by the final classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from wscl_fast.data import ImageDataset
from wscl_fast.train.config import EvalConfig
from wscl_fast.train.features import Features

Labels = npt.NDArray[np.int64]
WEIGHT_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)  # strong to weak
MOST_SIMILARITIES = 1 << 26  # of queries and bank at a time: 256 MiB
PATIENCE = 2  # weaker decays to try without a gain


@dataclass(frozen=True)
class Accuracies:
    """Shares (0 to 1) of the test split that are right, and the probe's weight decay, picked for them."""

    linear_top1: float
    linear_top5: float
    knn_top1: float
    knn_top5: float
    weight_decay: float


@dataclass(frozen=True)
class Score:
    """What the features are worth for one label column."""

    images: Accuracies  # every test image counts once
    groups: Accuracies  # every group of variants counts once, whatever its size
    n_classes: int
    n_train: int
    n_test: int
    n_test_groups: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """What `as_dict` gave."""
        counted = {name: Accuracies(**values[name]) for name in ("images", "groups")}
        return cls(**{**values, **counted})


def protocol(config: EvalConfig) -> str:
    """The evaluation, in words: printed with every table."""
    return (
        "frozen encoder in eval mode, features before the projection head; "
        "linear: multinomial logistic regression on standardised features, L-BFGS, weight decay "
        f"from {WEIGHT_DECAYS[0]:g} to {WEIGHT_DECAYS[-1]:g} picked on the validation split or, without one, "
        f"on a stratified {config.held_out:.0%} of the training split, then refitted on all of it; "
        f"k-NN: cosine, k = {config.knn_k}, votes weighted by exp(similarity / {config.knn_temperature:g}) "
        "(Wu et al., 2018); on the test split; variants of one thing are held out together"
    )


def evaluate(
    features: Features, dataset: ImageDataset, config: EvalConfig, *, seed: int = 0
) -> dict[str, Score]:
    """Scores per label column.

    Args:
        features: float32 [n, d], one row per sample of `dataset`.
        dataset: gives splits and labels; samples whose label is unknown (−1) are left out.
        config: label columns, k and temperature of the k-NN, share held out.
        seed: of the held-out part.

    Raises:
        ValueError: features of another number of samples, or not finite; an unknown label column; no labelled
            training or test sample.
    """
    if features.ndim != 2 or len(features) != len(dataset):
        raise ValueError(f"features: expected a row for each of {len(dataset)} samples, got {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(f"features: expected finite numbers, got NaN or infinity in row {bad[0]}")
    # By a power of two to numbers near 1: the squares of much larger or smaller ones are not float32's.
    features = np.ldexp(features, -np.frexp(np.abs(features).max(initial=0))[1])
    return {
        column: _evaluate_column(features, dataset, dataset.labels[column], column, config, seed)
        for column in _named_columns(dataset, config)
    }


def judged_columns(dataset: ImageDataset, config: EvalConfig) -> tuple[str, ...]:
    """The label columns of `config` that have both a labelled training and a labelled test sample.

    Raises:
        ValueError: an unknown label column.
    """
    columns = _named_columns(dataset, config)
    splits = [dataset.indices(split) for split in ("train", "test")]
    return tuple(c for c in columns if all((dataset.labels[c][rows] >= 0).any() for rows in splits))


def _named_columns(dataset: ImageDataset, config: EvalConfig) -> tuple[str, ...]:
    columns = config.labels if config.labels is not None else tuple(dataset.labels)
    for column in columns:
        if column not in dataset.labels:
            raise ValueError(
                f"eval.labels: '{dataset.name}' has no label column '{column}': "
                f"choose from {', '.join(dataset.labels) or 'none'}"
            )
    return columns


def _evaluate_column(
    features: Features, dataset: ImageDataset, labels: Labels, column: str, config: EvalConfig, seed: int
) -> Score:
    rows = {split: dataset.indices(split) for split in ("train", "val", "test")}
    rows = {split: picked[labels[picked] >= 0] for split, picked in rows.items()}
    for split in ("train", "test"):
        if len(rows[split]) == 0:
            raise ValueError(f"label column '{column}' has no labelled {split} sample: nothing to evaluate")
    train, test = rows["train"], rows["test"]
    groups = dataset.groups
    if len(rows["val"]):
        fit, pick = train, rows["val"]
    else:
        fit, pick = hold_out(train, labels, groups, config.held_out, seed)
    classes = int(labels.max()) + 1

    x = _standardised(features, train)
    y = torch.from_numpy(labels)
    unit = F.normalize(torch.from_numpy(features), dim=1)
    votes = knn_votes(
        unit[test], unit[train], y[train], classes, k=config.knn_k, temperature=config.knn_temperature
    )
    # An image that counts once and a group that counts once want different probes: each has its own.
    countings = [None, groups] if groups is not None else [None]
    picked = _pick_weight_decays(x, y, fit, pick, classes, [group_weights(pick, by) for by in countings])
    accuracies = []
    for by, (decay, start) in zip(countings, picked, strict=True):
        weights = fit_logistic(x[train], y[train], classes, decay, start=start)
        once = group_weights(test, by)
        accuracies.append(_accuracies(_affine(x[test], weights), votes, y[test], once, decay))
    return Score(
        images=accuracies[0],
        groups=accuracies[-1],
        n_classes=classes,
        n_train=len(train),
        n_test=len(test),
        n_test_groups=len(test) if groups is None else len(np.unique(groups[test])),
    )


def _accuracies(
    linear: Tensor, votes: Tensor, labels: Tensor, weights: Tensor, weight_decay: float
) -> Accuracies:
    return Accuracies(
        linear_top1=top_k_accuracy(linear, labels, 1, weights),
        linear_top5=top_k_accuracy(linear, labels, 5, weights),
        knn_top1=top_k_accuracy(votes, labels, 1, weights),
        knn_top5=top_k_accuracy(votes, labels, 5, weights),
        weight_decay=weight_decay,
    )


def hold_out(
    rows: Labels, labels: Labels, groups: Labels | None, share: float, seed: int
) -> tuple[Labels, Labels]:
    """(kept, held out): at most `share` of each class at random, whole groups together, never a whole class.

    Args:
        rows: int64, the samples to part.
        labels: int64 [n].
        groups: int64 [n], samples that belong together (variants of one thing); None: every sample alone.
        share: of each class.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    of_row = rows if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    sizes = np.bincount(labels[rows])
    room = np.minimum(np.round(share * sizes), np.maximum(sizes - 1, 0)).astype(np.int64)
    held = np.zeros(len(rows), dtype=bool)
    order = np.argsort(of_row, kind="stable")
    members_of = np.split(order, np.flatnonzero(np.diff(of_row[order])) + 1)
    for g in rng.permutation(len(members_of)):
        members = members_of[g]
        wanted = np.bincount(labels[rows[members]], minlength=len(room))
        if (wanted <= room).all():
            room -= wanted
            held[members] = True
    if not held.any():  # every class has a single group: judge on what is there
        return rows, rows
    return rows[~held], rows[held]


def _standardised(features: Features, train: npt.NDArray[np.int64]) -> Tensor:
    mean, std = features[train].mean(axis=0), features[train].std(axis=0)
    return torch.from_numpy((features - mean) / np.maximum(std, 1e-6 * max(float(std.max()), 1e-12)))


def _pick_weight_decays(
    x: Tensor, y: Tensor, fit: Labels, pick: Labels, classes: int, countings: Sequence[Tensor]
) -> list[tuple[float, Tensor]]:
    """For each way of counting, the decay of the highest accuracy on `pick`, and its weights.

    One path from strong to weak for all: each fit starts from the one before.
    """
    best: list[tuple[float, float, Tensor | None]] = [(-1.0, WEIGHT_DECAYS[0], None)] * len(countings)
    weights, since = None, 0
    x_fit, y_fit = x[fit], y[fit]
    for decay in WEIGHT_DECAYS:
        weights = fit_logistic(x_fit, y_fit, classes, decay, start=weights, max_iter=20)
        linear = _affine(x[pick], weights)
        since += 1
        for i, counting in enumerate(countings):
            accuracy = top_k_accuracy(linear, y[pick], 1, counting)
            if accuracy > best[i][0]:
                best[i], since = (accuracy, decay, weights), 0
        if since == PATIENCE:
            break
    return [(decay, weights) for _, decay, weights in best if weights is not None]


def _affine(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], x, weights[:-1])


def fit_logistic(
    x: Tensor,
    y: Tensor,
    classes: int,
    weight_decay: float,
    *,
    start: Tensor | None = None,
    max_iter: int = 60,
) -> Tensor:
    """Multinomial logistic regression by full-batch L-BFGS.

    Minimises `F.cross_entropy(x @ W + b, y) + weight_decay / 2 · ‖W‖²`, which has one minimum.

    Args:
        x: float32 [n, d].
        y: int64 [n], 0 … classes − 1.
        classes: number of classes.
        weight_decay: strength of the penalty; the bias is free of it.
        start: weights to begin from.
        max_iter: iterations at most.

    Returns:
        float32 [d + 1, classes]; the last row is the bias.
    """
    weights = torch.zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_(True)
    n = len(y)
    transposed = x.T.contiguous()  # a product of a transpose that lies as it is takes a third longer
    solver = torch.optim.LBFGS(
        [weights], max_iter=max_iter, history_size=10, tolerance_grad=1e-5, tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        with torch.no_grad():
            log_p = torch.log_softmax(_affine(x, weights), dim=1)
            penalty = 0.5 * weight_decay * weights[:-1].square().sum()
            value = penalty - log_p.gather(1, y[:, None]).mean()
            slope = log_p.exp_()
            slope[torch.arange(n), y] -= 1
            slope /= n
            weights.grad = torch.cat(
                [transposed @ slope + weight_decay * weights[:-1], slope.sum(0, keepdim=True)]
            )
            return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def knn_votes(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    classes: int,
    *,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> Tensor:
    """Votes of the k most similar samples of the bank, weighted by exp(similarity / temperature).

    Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018.

    Args:
        queries: float32 [m, d], unit rows.
        bank: float32 [n, d], unit rows.
        labels: int64 [n] of the bank.
        classes: number of classes.
        k: neighbours that vote (all, where the bank is smaller).
        temperature: of the votes.
        chunk: queries at a time, fewer where the bank is so large that they would take more than 256 MiB.

    Returns:
        float32 [m, classes].
    """
    votes = torch.zeros(len(queries), classes)
    chunk = max(1, min(chunk, MOST_SIMILARITIES // max(1, len(bank))))
    for start in range(0, len(queries), chunk):
        similarity, nearest = (queries[start : start + chunk] @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the largest is 1: no overflow
        votes[start : start + chunk].scatter_add_(1, labels[nearest], weights)
    return votes


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int, weights: Tensor | None = None) -> float:
    """Share of rows whose label is among the k highest scores; with weights [n], their weighted share."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    right = (best == labels[:, None]).any(dim=1).double()
    return float(right.mean() if weights is None else (right * weights).sum() / weights.sum())


def group_weights(rows: Labels, groups: Labels | None) -> Tensor:
    """Weights [len(rows)] under which every group counts once, float64."""
    if groups is None:
        return torch.ones(len(rows), dtype=torch.float64)
    _, inverse, counts = np.unique(groups[rows], return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / counts[inverse])
