"""The state of a long fit, written after every pass so that a kill costs one pass at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wscl_fast.files import replacing


class Checkpoint:
    """One file that holds how far a fit has come; written beside and moved into place.

    Args:
        file: where; its folder exists.
        purpose: what tells this fit from others, in plain values: a state of another one is refused.
    """

    def __init__(self, file: str | Path, purpose: dict[str, Any]) -> None:
        self.file, self.purpose = Path(file), purpose

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None where nothing was.

        Raises:
            ValueError: the file is of another fit, or no state at all.
        """
        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            purpose = state["purpose"]
        except Exception as error:
            raise ValueError(f"checkpoint: {self.file} cannot be read as one: {error}") from error
        if purpose != self.purpose:
            other = [name for name in self.purpose if purpose.get(name) != self.purpose[name]]
            raise ValueError(
                f"checkpoint: {self.file} belongs to another fit, with other {', '.join(other)}: "
                "remove it, or name another file"
            )
        return state

    def save(self, centroids: Tensor, **values: Any) -> None:
        """Replace what was saved."""
        with replacing(self.file) as beside:
            torch.save({"purpose": self.purpose, "centroids": centroids.cpu(), **values}, beside)
