"""The state of a long fit, written after every pass so that a kill costs one pass at most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wscl_fast.clustering.arrays import seed_of
from wscl_fast.clustering.points import Ranks
from wscl_fast.files import replacing


def check_file(checkpoint: object) -> None:
    """Refuse an argument ``checkpoint`` that names no file."""
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint: expected a file's path, got {type(checkpoint).__name__}")


class Checkpoint:
    """How far a fit has come, in a file that is written beside and moved into place.

    Several ranks have a file each, and keep the one of the pass before: a kill may find some of them a pass
    ahead of the others, never two, since they end no pass without each other.

    Args:
        file: where; its folder exists.
        purpose: what tells this fit from others, in plain values: a state of another one is refused.
        ranks: who fits.
        device: where they talk.
    """

    def __init__(
        self, file: str | Path, purpose: dict[str, Any], ranks: Ranks, device: torch.device | str
    ) -> None:
        self.purpose, self.ranks, self.device = purpose, ranks, device
        self.file = Path(file)
        self.before: Path | None = None
        if ranks.size > 1:
            self.file = self.file.with_name(f"{self.file.name}.{ranks.rank}")
            self.before = self.file.with_name(f"{self.file.name}.before")
        self.run = 0  # tells fits from each other that began from different draws

    def load(self) -> dict[str, Any] | None:
        """The last state that every rank saved, or None where there is none.

        Raises:
            FileNotFoundError: the folder, on this rank.
            ValueError: a file is of another fit, or no state at all; on all ranks, if something is so on one.
        """
        problem: ValueError | OSError | None = None
        states: list[dict[str, Any]] = []
        try:
            if not self.file.parent.is_dir():  # said before the first pass, and of which argument
                raise FileNotFoundError(f"checkpoint: there is no folder {self.file.parent}")
            states = [self._read(file) for file in (self.file, self.before) if file and file.exists()]
        except (ValueError, OSError) as error:  # one rank's, of which the others have to hear
            problem = error
        problems = int(self.ranks.sum(torch.tensor(int(problem is not None), device=self.device)))
        if problems:
            raise problem or ValueError(f"checkpoint: {problems} other ranks cannot go on from theirs")
        marks = [(int(state["n_iter"]), int(state["run"])) for state in states]
        told = torch.tensor((marks + 2 * [(-1, -1)])[:2], device=self.device)
        of_ranks = [set(map(tuple, two)) for two in self.ranks.gather(told[None]).tolist()]
        common = set(marks).intersection(*of_ranks)
        if not common:
            return None
        state = states[marks.index(max(common))]
        self.run = int(state["run"])
        return state

    def begin(self, centroids: Tensor) -> None:
        """Save where a fit starts."""
        self.run = int(self.ranks.first(torch.tensor(seed_of(None), device=self.device)))
        self.save(centroids, n_iter=0, history=[], ended=False)

    def save(self, centroids: Tensor, *, n_iter: int, history: Sequence[float], ended: bool) -> None:
        """Put a state in the place of the last one."""
        state = {"n_iter": n_iter, "history": list(history), "ended": ended, "run": self.run}
        with replacing(self.file) as beside:
            torch.save({**state, "purpose": self.purpose, "centroids": centroids.cpu()}, beside)
            if self.before is not None and self.file.exists():
                os.replace(self.file, self.before)

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            purpose = state["purpose"]
        except Exception as error:
            raise ValueError(f"checkpoint: {file} cannot be read as one: {error}") from error
        if purpose != self.purpose:
            other = [name for name in self.purpose if purpose.get(name) != self.purpose[name]]
            raise ValueError(
                f"checkpoint: {file} belongs to another fit, with other {', '.join(other)}: "
                "remove it, or name another file"
            )
        return state
