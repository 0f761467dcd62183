"""Checkpoints: whole or not there; the metrics log: cut back to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wscl_fast.train.checkpoint import MetricsLog, Position, load_checkpoint, read_metrics, save_checkpoint


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    position = Position(epoch=3, step=2, losses=[0.1 + 0.2, 1e-30], shares=[0.5], metrics_bytes=77)
    parts = {
        "w": torch.arange(3),
        "ids": np.array([1, -1]),
        "names": np.array(["a", "b"]),
        "deep": [{"x": np.float32(2)}],
    }
    save_checkpoint(file, position, parts)
    save_checkpoint(file, position, parts)
    back, loaded = load_checkpoint(file)
    assert back == position
    assert torch.equal(loaded["w"], parts["w"])  # type: ignore[arg-type]
    assert loaded["ids"].tolist() == [1, -1]
    assert loaded["names"] == ["a", "b"]
    assert loaded["deep"] == [{"x": 2.0}]
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        load_checkpoint(tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: damaged, or none of ours$"):
        load_checkpoint(broken)
    torch.save({"format": 99}, broken)
    with pytest.raises(ValueError, match="format 99, expected 1"):
        load_checkpoint(broken)


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file, 0)
    log.write("step", loss=1.0)
    kept = log.bytes
    log.write("step", loss=2.0)
    log.close()
    log = MetricsLog(file, kept)
    log.write("step", loss=3.0)
    log.close()
    with file.open("a") as stream:
        stream.write('{"kind": "st')  # a kill in mid-line
    assert [m["loss"] for m in read_metrics(file)] == [1.0, 3.0]
    log = MetricsLog(file, 10**6)  # more than there is: the rest was lost
    log.write("step", loss=4.0)
    log.close()
    assert [m["loss"] for m in read_metrics(file)] == [1.0, 3.0, 4.0]
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be read: it is damaged"):
        read_metrics(file)


def test_next_epoch_starts_clean() -> None:
    position = Position(epoch=1, step=5, losses=[1.0], shares=[0.5], metrics_bytes=3)
    position.next_epoch(9)
    assert position == Position(epoch=2, metrics_bytes=9)
