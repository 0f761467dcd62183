"""Settings: what is refused and how, and that what is written reads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from wscl_fast.train.config import Config, replace
from wscl_fast.train.settings import (
    ConfigError,
    describe_settings,
    differences,
    dump_config,
    load_config,
    save_config,
)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.epochs", "7", 7),
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "2", 2.0),
        ("train.threads", "null", None),
        ("loss.learnable-temperature", "true", True),
        ("data.folder", "2024", "2024"),
        ("data.label_columns", "kind, breed", ("kind", "breed")),
        ("model.widths", "8,16", (8, 16)),
        ("model.widths", "[8, 16]", (8, 16)),
        ("compare.seeds", "3", (3,)),
        ("compare.methods", "none,tags", ("none", "tags")),
        ("compare.methods", "none", ("none",)),
        ("compare.seeds", "", ()),
        ("cluster.method", "none", "none"),
        ("cluster.tags.n-clusters", "9", 9),
        ("augment.scale", "0.2,1", (0.2, 1.0)),
    ],
)
def test_text_is_read_by_the_type_of_its_setting(key: str, text: str, value: object) -> None:
    config: object = load_config(overrides=[(key, text)])
    for part in key.replace("-", "_").split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optim.lrr", "1", "unknown setting 'optim.lrr': did you mean 'optim.lr'?"),
        ("lr", "1", "unknown setting 'lr': did you mean 'optim.lr'?"),
        ("train.lr", "1", "unknown setting 'train.lr': did you mean 'optim.lr'?"),
        ("trian.epochs", "1", "unknown setting 'trian.epochs': did you mean 'train.epochs'?"),
        ("cluster.tag.n_clusters", "1", "did you mean 'cluster.tags.n_clusters'?"),
        ("train.zzzz", "1", "unknown setting 'train.zzzz': choose from train.epochs"),
        ("train.epochs", "many", "train.epochs must be an integer, got 'many'"),
        ("train.epochs", "1.5", "train.epochs must be an integer, got '1.5'"),
        ("train.epochs", "true", "train.epochs must be an integer, got 'true'"),
        ("train.epochs", "0", "train.epochs must be at least 1, got 0"),
        ("optim.momentum", "1.5", "optim.momentum must be at most 1.0, got 1.5"),
        ("optim.lr", "nan", "optim.lr must be at least 0.0, got nan"),
        ("optim.lr", ".inf", "optim.lr must be at most 3.4028"),
        ("optim.lr", "1e39", "optim.lr must be at most 3.4028"),
        ("optim.weight_decay", ".inf", "optim.weight_decay must be at most 3.4028"),
        ("train.threads", "100000", "train.threads must be at most 4096, got 100000"),
        ("loss.temperature", ".inf", "loss.temperature must be at most 3.4028"),
        ("train.seed", str(2**64), f"train.seed must be at most {2**63 - 1}, got {2**64}"),
        ("optim.lr", "fast", "optim.lr must be a number, got 'fast'"),
        ("loss.learnable_temperature", "maybe", "must be true or false, got 'maybe'"),
        ("optim.name", "adam", "optim.name cannot be 'adam': did you mean 'adamw'?"),
        ("optim.name", "zzz", "optim.name cannot be 'zzz': choose from sgd, adamw, lars"),
        ("compare.methods", "none,tag", "compare.methods cannot be 'tag': did you mean 'tags'?"),
        ("train", "3", "train is a section: set one of its keys (train.epochs"),
        ("augment.scale", "0.5", "augment.scale takes 2 values, got 1"),
        ("augment.hue", "0.9", "augment: hue"),
        ("train.epochs.x", "3", "unknown setting 'train.epochs.x': did you mean 'train.epochs'?"),
        ("compare.seeds.first", "3", "unknown setting 'compare.seeds.first': did you mean 'compare.seeds'?"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[(key, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-2, name: lars}\ntrain:\n  epochs: 3\ncluster: {tags: {n-clusters: 4}}\n")
    config = load_config(file, [("train.epochs", "5")])
    assert (config.optim.lr, config.optim.name, config.train.epochs) == (0.01, "lars", 5)
    assert config.cluster.tags.n_clusters == 4
    assert config.model == Config().model


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(
        "optim: {lr: 1e-2, name: lars}\ncluster: {tags: {n-clusters: 4, min-count: 3}}\n"
        "compare: {seeds: [1, 2]}\n"
    )
    (tmp_path / "shared" / "between.yaml").write_text("extends: base.yaml\noptim: {lr: 2e-2}\n")
    file = tmp_path / "c.yaml"
    file.write_text("extends: shared/between.yaml\ncluster: {tags: {n_clusters: 9}}\ncompare: {seeds: 3}\n")
    config = load_config(file, [("cluster.tags.min_count", "5")])
    assert (config.optim.lr, config.optim.name) == (0.02, "lars")
    assert (config.cluster.tags.n_clusters, config.cluster.tags.min_count) == (9, 5)
    assert config.compare.seeds == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: d.yaml", "c.yaml: extends d.yaml, but there is no file"),
        ("extends: c.yaml", "c.yaml: extends c.yaml, which extends it in turn"),
        ("extends: [a, b]", "c.yaml: extends must be a file's path, got ['a', 'b']"),
        ("train: {extends: c.yaml}", "unknown setting 'train.extends'"),
    ],
)
def test_a_file_that_cannot_be_extended_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load_config(tmp_path / "c.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: [1, 2]}", "optim.lr must be a number, got [1, 2]"),
        ("optim: 3", "optim is a section"),
        ("- a", "expected settings by section, got a list"),
        ("a: b: c", "not YAML"),
        ("optim: {learning_rate: 1}", "unknown setting 'optim.learning_rate'"),
        ("train: {epochs: '3'}", "train.epochs must be an integer, got '3'"),
        ("name: 5", "name must be text, got 5"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load_config(file)
    assert message in str(caught.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("name: größe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml: not UTF-8 text: .* at byte 8$"):
        load_config(tmp_path / "c.yaml")


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = replace(
        Config(),
        **{"optim.lr": 1e-5, "data.label_columns": ("größe", "1"), "data.folder": "null", "train.threads": 2},
        **{"cluster.kmeans.n_clusters": 7, "compare.seeds": (4, 5), "name": "a: b"},
    )
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert dump_config(load_config(tmp_path / "c.yaml")) == dump_config(config)
    assert list(tmp_path.iterdir()) == [tmp_path / "c.yaml"]
    changed = differences(Config(), config)
    assert "optim.lr" in changed
    assert "optim.name" not in changed


def test_every_setting_has_a_help_text() -> None:
    for key, default, text in describe_settings():
        assert default, key
        assert text, key
