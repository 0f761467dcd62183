"""The commands from their command lines: what they write, and what they say to a mistake."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from wscl_fast.train.cli import COMMANDS, main
from wscl_fast.train.config import Config
from wscl_fast.train.runs import load_encoder
from wscl_fast.train.settings import describe_settings, load_config

PICTURES = ("curves.png", "embedding.png", "nearest-neighbours.png")


def test_own_folder_with_hashtags_trains_end_to_end(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *own_data, "--train.epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "column 'tags' is taken as the tag column" in out
    assert "64 train, 0 val, 32 test images of 8 × 8" in out
    assert "Cl-InfoNCE, hashtags (chosen by cluster.method auto)" in out
    assert "anchors with a positive from another sample" in out
    assert "| random encoder " in out
    assert "| label linear | label k-NN |" in out

    run = tmp_path / "runs" / "train"
    config = load_config(run / "config.yaml")
    assert config.train.epochs == 2
    assert config.model.widths == (4, 8)
    assert len([m for m in (run / "metrics.jsonl").read_text().splitlines() if '"epoch"' in m]) >= 2
    for name in PICTURES:
        with Image.open(run / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5
    text = (run / "report.md").read_text()
    assert "## Stage 1" in text
    assert "| Cl-InfoNCE, hashtags |" in text
    written = json.loads((run / "evaluation.json").read_text())
    assert [r["method"] for r in written["results"]] == ["tags", "pixels", "random"]
    assert not [p for p in run.iterdir() if p.name.startswith(".")]

    encoder = load_encoder(run)
    assert not encoder.module.training
    own = written["results"][0]["scores"]["label"]

    assert main(["evaluate", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "protocol: frozen encoder in eval mode" in out
    again = json.loads((run / "evaluation.json").read_text())["results"][0]["scores"]["label"]
    assert again == own

    assert main(["embed", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    features = np.load(tmp_path / "out" / "features.npy")
    assert features.shape == (96, 8)
    keys = list(csv.DictReader((tmp_path / "out" / "keys.csv").open()))
    assert keys[2] == {"key": "002.png", "split": "test"}
    assert main(["embed", "--run", str(run), "--out", str(tmp_path / "out"), "--format", "parquet"]) == 0
    frame = pl.read_parquet(tmp_path / "out" / "features.parquet")
    assert frame["key"].to_list() == [k["key"] for k in keys]
    np.testing.assert_array_equal(frame["features"].to_numpy(), features)

    assert main(["embed", "--run", str(run), "--data.image-size", "16"]) == 2
    assert "data.image_size is 16: the encoder was trained at 8" in capsys.readouterr().err
    assert main(["cluster", *own_data, "--cluster.method", "kmeans", "--run", str(run)]) == 0


def test_without_labels_it_trains_and_says_that_nothing_is_judged(
    squares: Path, own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "bare.csv"
    frame = pl.read_csv(squares / "table.csv").select("path", pl.lit("train").alias("split"))
    frame.write_csv(table)
    bare = [
        *own_data,
        "--data.table",
        str(table),
        "--train.epochs",
        "1",
        "--cluster.kmeans.warmup-epochs",
        "0",
    ]
    assert main(["train", *bare, "--cluster.kmeans.n-clusters", "3"]) == 0
    out = capsys.readouterr().out
    assert "Cl-InfoNCE, k-means clusters (chosen by cluster.method auto)" in out
    assert "no labelled test images: not evaluated" in out
    assert all((tmp_path / "runs" / "train" / name).exists() for name in (*PICTURES, "report.md"))
    assert main(["evaluate", "--run", str(tmp_path / "runs" / "train")]) == 2


def test_evaluate_knows_the_encoder_and_obeys(
    squares: Path,
    own_data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run by tags, judged again with a table that has none, on a machine without its GPU."""
    from wscl_fast.train import jobs

    run, bare = tmp_path / "runs" / "train", tmp_path / "bare.csv"
    assert main(["train", *own_data, "--train.epochs", "1"]) == 0
    pl.read_csv(squares / "table.csv").select("path", "split", "label").write_csv(bare)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("device: cpu", "device: 'cuda:77'"))
    evaluate = ["evaluate", "--run", str(run)]
    assert main(evaluate) == 2
    used = []

    def spy(*args: object, batch_size: int, **kwargs: object) -> object:
        used.append(batch_size)
        return extract(*args, batch_size=batch_size, **kwargs)

    extract = jobs.extract_features
    monkeypatch.setattr(jobs, "extract_features", spy)
    evaluate += ["--train.device", "cpu"]
    assert main([*evaluate, "--data.table", str(bare), "--eval.batch-size", "7"]) == 0
    assert used == [7]
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert [r["method"] for r in results] == ["tags", "pixels", "random"]
    assert main([*evaluate, "--eval.knn-k", "3"]) == 0  # the others were judged by another protocol
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert [r["method"] for r in results] == ["tags"]
    capsys.readouterr()
    assert main([*evaluate, "--model.widths", "8,8"]) == 2
    assert "'model.widths' differs from what the encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "method", "clusters"),
    [
        ([], "tags", None),
        (["--cluster.method=attributes", "--data.attribute-columns", "shape,tone"], "attributes", 4),
        (["--cluster.method=hierarchy", "--data.hierarchy-columns", "branch", "--cluster.hierarchy.level=2"],
         "hierarchy", 2),
        (["--cluster.method=ids"], "ids", 4),
        (["--cluster.method=labels"], "labels", 4),
    ],
)  # fmt: skip
def test_cluster_writes_ids_and_what_they_are_worth(
    arguments: list[str],
    method: str,
    clusters: int | None,
    own_data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["cluster", *own_data, *arguments]) == 0
    out = capsys.readouterr().out
    assert "T = label" in out
    assert "I(Z;T)" in out
    rows = list(csv.DictReader((tmp_path / "runs" / "cluster" / "clusters.csv").open()))
    assert list(rows[0]) == ["key", "split", "cluster"]
    assert len(rows) == 96
    report = json.loads((tmp_path / "runs" / "cluster" / "clusters.json").read_text())
    assert report["method"] == method
    found = len({row["cluster"] for row in rows if row["split"] == "train"})
    assert report["reports"]["label"]["n_clusters"] == found
    assert clusters in (None, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--epocs", "3"], "unknown argument '--epocs': did you mean '--train.epochs'?"),
        (["compare", "--runs_dir", "x"], "unknown argument '--runs_dir': did you mean '--runs-dir'?"),
        (["train", "--train.epocs", "3"], "unknown setting 'train.epocs': did you mean 'train.epochs'?"),
        (["train", "--set", "train.epochs"], "--set takes key=value, got 'train.epochs'"),
        (["train", "--train.epochs"], "--train.epochs needs a value"),
        (["train", "--train.epochs", "--resume"], "--train.epochs needs a value"),
        (["train", "--set", "train.epochs=x"], "train.epochs must be an integer, got 'x'"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml: No such file or directory"),
        (["train", "--data.folder", "/nowhere"], "data.table is missing"),
        (["train", "--data.folder", "/nowhere", "--data.table", "/nowhere.csv"], "/nowhere.csv"),
        (["train", "extra"], "unknown argument 'extra'"),
        (["evaluate"], "--run"),
        (["evaluate", "--run", "/nowhere"], "no run at /nowhere"),
        (["embed", "--run", "/nowhere", "--format", "xls"], "--format"),
        (["embed", "--run", "/nowhere", "--out", "f.npy"], "--out: expected a folder, got the file"),
        (["compare", "--recipe", "openmojo"], "unknown recipe 'openmojo': did you mean 'openmoji'?"),
        (["train", "--recipe", "reproduce", "--config", "x.yaml"], "not allowed with argument"),
        (["train", "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["cluster", "--run", "/nowhere", "--cluster.method", "none"], "no run at /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("wscl-fast: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_mistakes_that_need_the_data(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, message in (
        (["--cluster.method", "hierarchy"], "needs data.hierarchy_columns"),
        (["--data.tag-column", "tagz"], "tagz"),
        (["--train.device", "cuda:77"], "train.device 'cuda:77'"),
        (["--train.device", "abacus"], "train.device 'abacus' is no device"),
        (["--train.device", "meta"], "train.device 'meta' is not supported"),
        (["--model.encoder", "resnet19"], "did you mean 'resnet1"),
        (["--train.epochs", "1", "--eval.labels", "colour"], "no label column 'colour': choose from label"),
    ):
        assert main(["train", *own_data, *extra, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert main(["cluster", *own_data, "--cluster.method", "kmeans"]) == 2
    assert "name a trained run with --run DIR" in capsys.readouterr().err
    assert main(["train", *own_data, "--eval.labels", "colour", "--overwrite", "--train.epochs", "0"]) == 2


def test_the_process_says_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wscl_fast", "train", "--set", "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "wscl-fast: error: unknown setting 'optim.lrr': did you mean 'optim.lr'?\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request() -> None:
    with pytest.raises(ValueError, match="unknown setting"):
        main(["train", "--set", "optim.lrr=1", "--traceback"])


def test_help_names_every_command_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {key} = " in out for key, _, _ in describe_settings(Config()) if "." in key)
    assert max(map(len, out.splitlines())) <= 150
    assert main([]) == 0


def test_a_small_split_shrinks_the_batch(own_data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *own_data, "--train.batch-size", "4096", "--train.epochs", "1"]) == 0


@pytest.mark.parametrize("module", ["yaml", "safetensors", "matplotlib"])
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    """In a process of its own, where nothing has been imported yet, and before anything is trained."""
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from wscl_fast.train.cli import main
sys.exit(main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f'wscl-fast: error: {module} is not installed: pip install "wscl-fast[train]"\n'
