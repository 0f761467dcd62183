"""Checkpoints that survive `kill -9`, and the metrics log that is cut back to them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from wscl_fast.files import replacing

FORMAT = 1


@dataclass
class Position:
    """Where a run stands: the next step to take, and the finished steps of its epoch."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)  # of the finished steps of this epoch
    shares: list[float] = field(default_factory=list)  # anchors with a positive from another sample
    metrics_bytes: int = 0  # metrics.jsonl up to here belongs to the finished steps

    def next_epoch(self, metrics_bytes: int) -> None:
        """Stand before the first step of the next epoch."""
        self.epoch, self.step, self.losses, self.shares = self.epoch + 1, 0, [], []
        self.metrics_bytes = metrics_bytes


def save_checkpoint(file: Path, position: Position, parts: dict[str, Any]) -> None:
    """Replace `file`: at every moment there is one whole checkpoint.

    Args:
        file: where to.
        position: what is done so far.
        parts: state dicts, tensors, numpy arrays and plain values, nested.
    """
    content = {"format": FORMAT, "position": vars(position), "parts": _to_tensors(parts)}
    with replacing(file) as beside:
        torch.save(content, beside)


def load_checkpoint(file: Path) -> tuple[Position, dict[str, Any]]:
    """What `save_checkpoint` wrote; tensors on the CPU, arrays as tensors.

    Raises:
        OSError: no such checkpoint, or none that may be read.
        ValueError: it is no checkpoint of ours.
    """
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint at {file}: nothing to resume")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["format"] == FORMAT:
            return Position(**content["position"]), content["parts"]
        reason = f"format {content['format']}, expected {FORMAT}"
    except OSError:
        raise
    except Exception as error:  # torch's own words advise to load it unchecked
        raise ValueError(f"{file} cannot be read as a checkpoint: damaged, or none of ours") from error
    raise ValueError(f"{file} cannot be read as a checkpoint: {reason}")


def _to_tensors(value: Any) -> Any:
    """Arrays as tensors (those of text as lists): what `weights_only` loading accepts."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: _to_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(v) for v in value)
    return value


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, appended, flushed line by line."""

    def __init__(self, file: Path, keep_bytes: int) -> None:
        """Continue `file` after its first `keep_bytes`; what a killed run wrote later is cut off."""
        if file.exists():  # to a line's end, should a machine that lost its power have lost some of them
            os.truncate(file, file.read_bytes().rfind(b"\n", 0, keep_bytes) + 1)
        self._stream: IO[str] = file.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Append `{"kind": kind, **values}`."""
        self._stream.write(json.dumps({"kind": kind, **values}) + "\n")
        self._stream.flush()

    @property
    def bytes(self) -> int:
        """Length of the file so far."""
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All lines of a `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises:
        ValueError: it is damaged.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:  # not UTF-8, not JSON
        raise ValueError(f"{file} cannot be read: it is damaged; move it away") from error
