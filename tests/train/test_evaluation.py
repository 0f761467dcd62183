"""The probe and the k-NN: exact on separable features, at chance on noise, blind to the test split."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wscl_fast.data import ImageDataset
from wscl_fast.train import evaluation
from wscl_fast.train.config import EvalConfig
from wscl_fast.train.evaluation import (
    Score,
    evaluate,
    fit_logistic,
    group_weights,
    hold_out,
    judged_columns,
    knn_votes,
    protocol,
    top_k_accuracy,
)
from wscl_fast.train.features import extract_features, pixel_features

CLASSES = 8


def made(n: int = 400, *, signal: float, seed: int = 0) -> tuple[np.ndarray, ImageDataset]:
    """Features whose classes stand `signal` apart, and the data set they are of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    centres = rng.normal(size=(CLASSES, 16))
    features = (signal * centres[labels] + rng.normal(size=(n, 16))).astype(np.float32)
    data = ImageDataset(
        name="made",
        images=np.zeros((n, 3, 8, 8), dtype=np.uint8),
        keys=[str(i) for i in range(n)],
        split=np.where(np.arange(n) % 4 == 0, "test", "train"),
        labels={"class": labels},
        label_names={"class": [str(c) for c in range(CLASSES)]},
    )
    return features, data


def test_separable_features_are_told_apart() -> None:
    features, data = made(signal=20.0)
    score = evaluate(features, data, EvalConfig())["class"]
    assert (
        score.images.linear_top1,
        score.images.knn_top1,
        score.images.linear_top5,
        score.images.knn_top5,
    ) == (1.0, 1.0, 1.0, 1.0)
    assert (score.n_classes, score.n_train, score.n_test, score.n_test_groups) == (CLASSES, 300, 100, 100)


def test_noise_is_at_chance() -> None:
    features, data = made(2000, signal=0.0)
    score = evaluate(features, data, EvalConfig())["class"]
    assert 0.05 < score.images.linear_top1 < 0.2
    assert 0.05 < score.images.knn_top1 < 0.2
    assert 0.5 < score.images.linear_top5 < 0.75


def test_test_labels_do_not_reach_the_classifiers() -> None:
    features, data = made(signal=1.0)
    first = evaluate(features, data, EvalConfig())["class"]
    shuffled = data.labels["class"].copy()
    test = data.indices("test")
    shuffled[test] = (shuffled[test] + 1) % CLASSES
    other = evaluate(features, dataclasses.replace(data, labels={"class": shuffled}), EvalConfig())["class"]
    assert other.images.weight_decay == first.images.weight_decay
    assert other.images.linear_top1 < first.images.linear_top1


def test_unknown_labels_are_left_out_and_few_classes_have_a_top5() -> None:
    features, data = made(signal=20.0)
    labels = np.where(data.labels["class"] > 2, -1, data.labels["class"])
    known = dataclasses.replace(data, labels={"class": labels})
    score = evaluate(features, known, EvalConfig())["class"]
    assert score.n_test == (labels[data.indices("test")] >= 0).sum()
    assert score.images.linear_top5 == 1.0


def test_a_validation_split_picks_the_decay() -> None:
    features, data = made(signal=1.0)
    split = data.split.copy()
    split[1::8] = "val"
    score = evaluate(features, dataclasses.replace(data, split=split), EvalConfig())["class"]
    assert score.n_train == (split == "train").sum()


def test_scores_do_not_depend_on_the_scale() -> None:
    features, data = made(signal=1.0)
    scores = evaluate(features, data, EvalConfig())
    for power in (100, -100):
        assert evaluate(np.ldexp(features, power), data, EvalConfig()) == scores


def test_refusals() -> None:
    features, data = made(signal=1.0)
    with pytest.raises(ValueError, match="no label column 'clas': choose from class"):
        evaluate(features, data, EvalConfig(labels=("clas",)))
    unlabelled = np.where(data.split == "test", -1, data.labels["class"])
    with pytest.raises(ValueError, match="'class' has no labelled test sample"):
        evaluate(features, dataclasses.replace(data, labels={"class": unlabelled}), EvalConfig())
    with pytest.raises(
        ValueError, match=r"features: expected a row for each of 400 samples, got \(399, 16\)"
    ):
        evaluate(features[1:], data, EvalConfig())
    features[[7, 9], 3] = np.nan, np.inf
    with pytest.raises(ValueError, match="features: expected finite numbers, got NaN or infinity in row 7"):
        evaluate(features, data, EvalConfig())


def test_columns_without_a_test_label_are_not_judged() -> None:
    _, data = made(signal=1.0)
    known, test = data.labels["class"], data.split == "test"
    data = dataclasses.replace(
        data,
        labels={"class": known, "late": np.where(test, -1, known), "early": np.where(test, known, -1)},
        label_names=dict.fromkeys(("class", "late", "early"), data.label_names["class"]),
    )
    assert judged_columns(data, EvalConfig()) == ("class",)
    assert judged_columns(data, EvalConfig(labels=("late",))) == ()
    with pytest.raises(ValueError, match="no label column 'clas': choose from class"):
        judged_columns(data, EvalConfig(labels=("clas",)))


def test_logistic_regression_finds_the_minimum() -> None:
    """At the minimum the gradient, taken by autograd of the definition, is zero."""
    features, data = made(signal=0.5)
    x, y = torch.from_numpy(features), torch.from_numpy(data.labels["class"])
    weights = fit_logistic(x, y, CLASSES, 0.01, max_iter=300).requires_grad_()
    loss = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + 0.005 * weights[:-1].square().sum()
    (slope,) = torch.autograd.grad(loss, weights)
    assert slope.abs().max() < 1e-3


def test_knn_votes_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    queries, bank = F.normalize(torch.randn(5, 4), dim=1), F.normalize(torch.randn(30, 4), dim=1)
    labels = torch.randint(0, 3, (30,))
    votes = knn_votes(queries, bank, labels, 3, k=7, temperature=0.1, chunk=2)
    for q, vote in zip(queries, votes, strict=True):
        similarity = bank @ q
        expected = torch.zeros(3)
        for j in similarity.argsort(descending=True)[:7]:
            expected[labels[j]] += torch.exp((similarity[j] - similarity.max()) / 0.1)
        torch.testing.assert_close(vote, expected)
    assert knn_votes(queries, bank[:3], labels[:3], 3, k=20, temperature=0.1).shape == (5, 3)


class Largest(TorchFunctionMode):
    """Remembers how many numbers the largest tensor has that was made."""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_the_similarities_to_a_large_bank_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = F.normalize(torch.randn(50, 4), dim=1), F.normalize(torch.randn(300, 4), dim=1)
    labels = torch.randint(0, 3, (300,))
    votes = knn_votes(queries, bank, labels, 3, k=7, temperature=0.1)
    monkeypatch.setattr(evaluation, "MOST_SIMILARITIES", 2000)
    with Largest() as largest:
        again = knn_votes(queries, bank, labels, 3, k=7, temperature=0.1)
    torch.testing.assert_close(again, votes)
    assert largest.numbers <= 2000


def test_hold_out_is_stratified_and_keeps_groups_together() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(100), 3)
    labels = np.repeat(rng.integers(0, 4, 100), 3)
    labels[-3:] = 4  # a class of one group
    rows = np.arange(300)
    kept, held = hold_out(rows, labels, groups, 0.2, seed=0)
    assert sorted([*kept, *held]) == rows.tolist()
    assert not set(groups[kept]) & set(groups[held])
    for c in range(4):
        assert 0.1 < (labels[held] == c).sum() / (labels == c).sum() <= 0.21
    assert 4 not in labels[held]
    again = hold_out(rows, labels, groups, 0.2, seed=0)[1]
    assert (again == held).all()
    assert hold_out(rows, labels, groups, 0.2, seed=1)[1].tolist() != held.tolist()
    kept, held = hold_out(rows, labels, None, 0.2, seed=0)
    assert [int((labels[held] == c).sum()) for c in range(5)] == [
        round(0.2 * (labels == c).sum()) for c in range(5)
    ]
    without_first = np.where(labels == 0, 1, labels)  # a class that none of the rows has
    kept, held = hold_out(rows, without_first, None, 0.2, seed=0)
    assert not set(kept) & set(held)
    single = np.arange(4)
    assert [x.tolist() for x in hold_out(single, single, None, 0.5, seed=0)] == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_every_group_counts_once() -> None:
    groups = np.array([7, 7, 7, 3])
    weights = group_weights(np.arange(4), groups)
    scores, labels = torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 1, 0])
    assert top_k_accuracy(scores, labels, 1, weights) == pytest.approx((2 / 3 + 0) / 2)
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(0.5)


def test_images_and_groups_are_counted_apart() -> None:
    features, data = made(signal=1.0)
    test = data.indices("test")
    groups = np.arange(len(features))
    right = data.labels["class"][test] < CLASSES // 2
    groups[test[right]] = len(features)  # one large group, of the lower classes
    score = evaluate(features, dataclasses.replace(data, groups=groups), EvalConfig())["class"]
    assert score.n_test_groups == 1 + (~right).sum()
    assert score.images != score.groups
    assert Score.from_dict(json.loads(json.dumps(score.as_dict()))) == score
    alone = evaluate(features, data, EvalConfig())["class"]
    assert alone.images == alone.groups


def test_features_come_from_eval_mode_and_the_mode_comes_back() -> None:
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192), torch.nn.Dropout(0.9))
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 8, 8), dtype=np.uint8)
    out = extract_features(encoder, images, lambda x: x.float() / 255, batch_size=4)
    np.testing.assert_allclose(out, images.reshape(10, -1) / 255.0, rtol=1e-4)
    assert encoder.training
    assert encoder[1].num_batches_tracked == 0


def test_pixels_are_averaged_down() -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 3, 32, 32), dtype=np.uint8)
    out = pixel_features(images)
    expected = images.reshape(3, 3, 16, 2, 16, 2).mean(axis=(3, 5)).reshape(3, -1) / 255
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert pixel_features(images[:, :, :8, :8]).shape == (3, 192)


def test_the_protocol_names_its_numbers() -> None:
    text = protocol(EvalConfig(knn_k=7, knn_temperature=0.5, held_out=0.1))
    assert "k = 7" in text
    assert "similarity / 0.5" in text
    assert "10%" in text
