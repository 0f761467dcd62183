from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from wscl_fast.clustering import TagClusters, diagnose, method_from_state_dict
from wscl_fast.clustering import tags as tags_module
from wscl_fast.clustering.sparse import SparseRows, truncated_svd

THEMES = {"sea": "fish boat wave salt", "city": "car street tower neon", "farm": "cow barn hay milk"}


def themed(n: int, *, seed: int = 0, noise: int = 0) -> tuple[list[list[str]], np.ndarray]:
    """Samples with two of their theme's four tags, and maybe some tags that mean nothing."""
    rng = np.random.default_rng(seed)
    words = [theme.split() for theme in THEMES.values()]
    truth = rng.integers(0, len(words), n)
    tags = [
        list(rng.choice(words[t], 2, replace=False)) + [f"n{rng.integers(40)}" for _ in range(noise)]
        for t in truth
    ]
    return [[str(tag) for tag in row] for row in tags], truth


def random_tags(n: int, n_tags: int, *, seed: int = 0) -> list[list[str]]:
    """Tags of very different frequency, two to six a sample."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, n_tags + 1) ** 0.8
    drawn = rng.choice(n_tags, (n, 6), p=weight / weight.sum())
    return [[f"t{tag}" for tag in row[: rng.integers(2, 7)]] for row in drawn]


def dense(x: SparseRows) -> torch.Tensor:
    return x.matmul(torch.eye(x.n_columns))


def test_tfidf_equals_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    tags = [*random_tags(200, 60), ["never seen elsewhere"], []]
    model = TagClusters(5, min_count=3).fit(tags)
    theirs = text.TfidfVectorizer(analyzer=lambda t: sorted(set(t)), min_df=3)
    expected = theirs.fit_transform(tags).toarray()
    assert model.tags_ == theirs.get_feature_names_out().tolist()
    np.testing.assert_allclose(dense(model._tfidf(tags)).numpy(), expected, atol=1e-6)


def test_themes_are_found_though_their_tags_differ():
    tags, truth = themed(300)
    report = diagnose(TagClusters(3).fit_predict(tags), truth)
    assert report.mutual_information == pytest.approx(report.label_entropy)


def test_smoothing_brings_together_tags_that_occur_together():
    tags, truth = themed(600, noise=1)
    plain = diagnose(TagClusters(6, smoothing=0).fit_predict(tags), truth)
    smooth = diagnose(TagClusters(6, smoothing=1).fit_predict(tags), truth)
    assert smooth.mutual_information >= plain.mutual_information
    assert smooth.mutual_information == pytest.approx(smooth.label_entropy, rel=0.02)


def test_without_smoothing_the_angles_are_those_of_tfidf():
    tags = random_tags(120, 50)
    model = TagClusters(5, smoothing=0).fit(tags)
    x = model._tfidf(tags)
    seen = x.matmul(model._components)
    torch.testing.assert_close(seen @ seen.T, dense(x) @ dense(x).T, atol=1e-5, rtol=1e-4)


def test_beyond_the_rank_angles_are_kept_nearly(monkeypatch):
    monkeypatch.setattr(tags_module, "_RANK", 32)
    tags = random_tags(800, 400)
    model = TagClusters(5, smoothing=0).fit(tags)
    x = model._tfidf(tags)
    seen = x.matmul(model._components)
    assert seen.shape[1] == 32 + tags_module._TAIL
    error = (seen @ seen.T - dense(x) @ dense(x).T).fill_diagonal_(0)
    assert error.square().mean().sqrt() < 0.1


def test_beyond_the_rank_samples_with_rare_tags_only_still_have_a_place(monkeypatch):
    monkeypatch.setattr(tags_module, "_RANK", 8)
    tags = [[f"common{i % 8}"] for i in range(400)] + [[f"rare{i}"] for i in range(12) for _ in range(2)]
    ids = TagClusters(20).fit_predict(tags)
    assert len(set(ids.tolist())) == 20
    assert len(set(ids[400:].tolist())) == 12


def test_order_and_repetition_of_tags_do_not_matter():
    tags, _ = themed(200)
    model = TagClusters(3).fit(tags)
    assert np.array_equal(model.predict([[*reversed(row), row[0]] for row in tags]), model.predict(tags))


@pytest.mark.parametrize("n_tags", [50, 1500])
def test_predict_gives_the_training_samples_their_clusters(n_tags):
    tags = [*random_tags(1000, n_tags), []]
    model = TagClusters(40)
    ids = model.fit_predict(tags)
    assert ids.dtype == np.int64
    assert np.array_equal(model.predict(tags), ids)
    # matrix products of other shapes round differently, which may move a sample between equally near clusters
    assert np.mean(model.predict(tags[:300]) == ids[:300]) > 0.99
    assert ids[-1] == -1
    assert np.bincount(ids[:-1][ids[:-1] >= 0], minlength=40).min() > 0


def test_samples_without_a_known_tag_have_no_cluster():
    tags, _ = themed(100)
    model = TagClusters(3)
    ids = model.fit_predict([*tags, [], ["seen once"]])
    assert "seen once" not in model.tags_
    assert (ids[:-2] >= 0).all()
    assert ids[-2:].tolist() == [-1, -1]
    assert model.predict([["seen once"], ["unheard of"], []]).tolist() == [-1, -1, -1]
    assert model.predict([["unheard of", "cow"]]).tolist() == model.predict([["cow"]]).tolist() != [-1]
    assert model.predict([("cow",), {"cow"}]).tolist() == model.predict([["cow"], ["cow"]]).tolist()


def test_same_seed_same_clusters():
    tags = random_tags(600, 700)
    first, second, other = (TagClusters(30, seed=s).fit_predict(tags) for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n_tags", [50, 900])
def test_state_dict_round_trip(n_tags):
    tags = random_tags(700, n_tags)
    model = TagClusters(20, min_count=3, smoothing=0.25, seed=4).fit(tags)
    again = method_from_state_dict(model.state_dict())
    assert isinstance(again, TagClusters)
    new = [*random_tags(100, n_tags, seed=9), []]
    assert np.array_equal(again.predict(new), model.predict(new))
    assert again.n_clusters_ == 20
    assert again.state_dict().keys() == model.state_dict().keys()
    for key in ("n_clusters", "min_count", "smoothing", "seed", "tags"):
        assert again.state_dict()[key] == model.state_dict()[key]


def test_thousands_of_samples_and_tags_without_a_warning():
    tags = random_tags(3600, 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TagClusters(150).fit(tags)
    assert model.predict([]).shape == (0,)


def test_truncated_svd_equals_the_definition():
    tags = random_tags(300, 80)
    x = TagClusters(2).fit(tags)._tfidf(tags)
    matrix = dense(x).double()
    expected = torch.linalg.svdvals(matrix)
    values, right = truncated_svd(x, 500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(values.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((matrix @ right.double()).norm(dim=0), values.double(), atol=1e-4, rtol=1e-4)
    leading, _ = truncated_svd(x, 10, torch.Generator().manual_seed(0))
    assert (leading <= expected[:10] * (1 + 1e-5)).all()  # found in a subspace: never more than the truth
    torch.testing.assert_close(leading.double(), expected[:10], atol=0, rtol=0.05)


def test_transposed():
    tags = [*random_tags(30, 20), []]
    x = TagClusters(2).fit(tags)._tfidf(tags)
    assert torch.equal(dense(x.transposed()), dense(x).T)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: TagClusters(0), ValueError, "n_clusters: expected at least 1"),
        (lambda: TagClusters(3, min_count=0), ValueError, "min_count: expected at least 1"),
        (lambda: TagClusters(3, smoothing=-1), ValueError, "smoothing"),
        (lambda: TagClusters(3, smoothing=float("nan")), ValueError, "smoothing"),
        (
            lambda: TagClusters(3, smoothing=400).fit(themed(300)[0]),
            ValueError,
            r"smoothing: expected at most \d+ for these tags, got 400",
        ),
        (lambda: TagClusters(3, seed=1.5), TypeError, "seed: expected an int, got float"),
        (lambda: TagClusters().fit("red"), TypeError, "info: expected a sequence .* got str"),
        (
            lambda: TagClusters().fit(["red blue"]),
            TypeError,
            r"info\[0\]: expected a list of strings, got str",
        ),
        (
            lambda: TagClusters().fit([["a"], None]),
            TypeError,
            r"info\[1\]: expected a list of strings, got NoneType",
        ),
        (lambda: TagClusters().fit([[1]]), TypeError, r"info\[0\]: expected strings, got int"),
        (lambda: TagClusters().fit([]), ValueError, "n_clusters: expected at most the 0 distinct samples"),
        (
            lambda: TagClusters(5).fit(themed(300)[0][:3] * 10),
            ValueError,
            r"n_clusters: expected at most the 3 distinct samples .* got 5",
        ),
        (lambda: TagClusters(1).fit([["a"], ["b"]]), ValueError, "at most the 0 distinct samples"),
        (lambda: TagClusters(smoothing=None), TypeError, "smoothing: expected a number, got NoneType"),
        (lambda: TagClusters(seed=2**70), ValueError, "seed: expected 0 to"),
        (lambda: TagClusters().fit(np.array(1.0)), ValueError, "info: .* got an array of 0 dimensions"),
        (lambda: TagClusters().predict([["a"]]), RuntimeError, "TagClusters is not fitted"),
        (lambda: TagClusters().state_dict(), RuntimeError, "TagClusters is not fitted"),
    ],
)
def test_errors_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()
