"""The folder of a run read again: whose columns are taken, whose settings, and what is no encoder."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from wscl_fast.train.cli import main
from wscl_fast.train.config import Config, DataConfig, ModelConfig, TrainConfig
from wscl_fast.train.model import ContrastiveModel
from wscl_fast.train.runs import KEYS, clear_run, load_data, load_encoder, save_encoder
from wscl_fast.train.settings import save_config

MODEL = ModelConfig(widths=(4,), depths=(1,), head_hidden=8, head_dim=4)


def data_config(squares: Path, tmp_path: Path, **columns: Any) -> DataConfig:
    """The squares, with some columns of their table changed."""
    names = ("tag_column", "cluster_column", "label_columns")
    chosen = {name: columns.pop(name) for name in names if name in columns}
    pl.read_csv(squares / "table.csv").with_columns(**columns).write_csv(tmp_path / "table.csv")
    return DataConfig(
        folder=str(squares / "pictures"),
        table=str(tmp_path / "table.csv"),
        image_size=8,
        cache_dir=str(squares / "cache"),
        **chosen,
    )


def test_a_usual_column_that_nobody_named_is_taken_where_it_serves(squares: Path, tmp_path: Path) -> None:
    blank, half = pl.lit(None, pl.String), pl.when(pl.int_range(pl.len()) % 2 == 0).then("cluster")
    full = load_data(data_config(squares, tmp_path))
    assert full.tags is not None
    assert full.clusters is not None
    some = load_data(data_config(squares, tmp_path, cluster=half, tags=blank))
    assert len(some) == 96
    assert (some.tags, some.clusters) == (None, None)
    other = load_data(data_config(squares, tmp_path, tags=blank, hashtags=pl.col("tone"), label=blank))
    assert other.tags is not None
    assert other.tags[0] == ("red",)
    assert other.labels == {}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tag_column": "tags"}, "column 'tags' of table.csv is empty"),
        ({"label_columns": ("label",)}, "column 'label' of table.csv is empty"),
        ({"cluster_column": "cluster"}, "48 of 96 rows of table.csv cannot be used"),
    ],
)
def test_a_named_column_has_to_serve(
    named: dict[str, Any], message: str, squares: Path, tmp_path: Path
) -> None:
    blank, half = pl.lit(None, pl.String), pl.when(pl.int_range(pl.len()) % 2 == 0).then("cluster")
    config = data_config(squares, tmp_path, cluster=half, tags=blank, label=blank, **named)
    with pytest.raises(ValueError, match=message):
        load_data(config)


@pytest.fixture
def run(squares: Path, tmp_path: Path) -> Path:
    """A run that has an encoder, untrained, and nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = Config(name="run", data=data_config(squares, tmp_path), model=MODEL, train=TrainConfig(seed=3))
    save_config(config, folder / "config.yaml")
    save_encoder(folder, ContrastiveModel(MODEL, 8), config, "none")
    return folder


def test_cluster_takes_the_data_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["cluster", "--run", str(run), "--cluster.kmeans.n-clusters", "3"]
    assert main([*command, "--cluster.method", "kmeans"]) == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "cluster" / "clusters.csv").open()))
    assert [row["key"] for row in rows][:2] == ["000.png", "001.png"]
    assert {row["cluster"] for row in rows} == {"0", "1", "2"}
    assert main([*command, "--cluster.method", "hierarchy", "--data.hierarchy-columns", "branch"]) == 0
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "encoder.safetensors"]


def test_features_of_other_data_need_a_place_of_their_own(
    run: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--data.table", str(squares / "table.csv")]
    for out in ([], ["--out", str(run)]):
        assert main(["embed", "--run", str(run), *other, *out]) == 2
        assert "keeps the features of its own data and 'data.table' differs" in capsys.readouterr().err
    assert main(["embed", "--run", str(run), *other, "--out", str(tmp_path / "out")]) == 0
    assert main(["embed", "--run", str(run)]) == 0
    assert (run / KEYS).exists()
    clear_run(run)
    assert not list(run.iterdir())


def test_features_of_another_run_stay(
    run: Path, tmp_path: Path, check_refused: Callable[[list[str], str, Path], None]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    (other / "features.npy").write_bytes(b"its own")
    embed = ["embed", "--run", str(run), "--out"]
    for kind in ("npy", "parquet"):
        check_refused([*embed, str(other), "--format", kind], f"{other} holds another run, whose fea", other)
    (tmp_path / "link").symlink_to(run)
    for out in (run, tmp_path / "link", tmp_path / "out", tmp_path / "out"):  # features alone are replaced
        assert main([*embed, str(out)]) == 0


def test_no_encoder_of_ours_is_said(run: Path) -> None:
    assert not load_encoder(run).module.training
    save_config(Config(model=ModelConfig(widths=(8,), depths=(1,))), run / "config.yaml")
    with pytest.raises(ValueError, match=r"encoder.safetensors cannot be read: it is damaged, or not of the"):
        load_encoder(run)
    (run / "encoder.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"encoder.safetensors cannot be read: it is damaged, or not of the"):
        load_encoder(run)


def test_files_that_are_no_run_stay(
    own_data: list[str], tmp_path: Path, check_refused: Callable[[list[str], str, Path], None]
) -> None:
    folder = tmp_path / "runs" / "train"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("my own")
    train = ["train", *own_data, "--train.epochs", "1"]
    check_refused(train, f"{folder} is no run's but has a report.md, which a run would replace", folder)
    assert main([*train, "--overwrite"]) == 0


def test_resume_leaves_a_comparison_alone(
    own_data: list[str], tmp_path: Path, check_refused: Callable[[list[str], str, Path], None]
) -> None:
    runs = tmp_path / "runs"
    command = ["compare", *own_data, "--train.epochs", "1", "--compare.workers", "1", "--compare.seeds", "0"]
    assert main([*command, "--compare.methods", "random,none"]) == 0
    resume = ["train", "--runs-dir", str(runs), "--name", "compare", "--resume"]
    check_refused(resume, "but no checkpoint.pt to resume from: a comparison goes on with", runs)


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"[]", b'{"results": [1]}', b'{"results": []}'])
def test_a_damaged_evaluation_is_named(
    damage: bytes, run: Path, check_refused: Callable[[list[str], str, Path], None]
) -> None:
    (run / "evaluation.json").write_bytes(damage)
    message = f"{run}/evaluation.json cannot be read as an evaluation: it is damaged, or none of ours"
    check_refused(["evaluate", "--run", str(run)], message, run)
