"""Which of the clustered losses is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wscl_fast.functional._checks import LARGEST_FLOAT32, check_choice, check_range

Positives = Literal["out", "in"]
Denominator = Literal["all", "other", "decoupled"]


@dataclass(frozen=True)
class Variant:
    """What :func:`wscl_fast.functional.clustered_infonce` says of each of these, checked."""

    positives: Positives = "out"
    denominator: Denominator = "all"
    hardness: float = 0.0
    prior: float = 0.0

    def __post_init__(self) -> None:
        check_choice("positives", self.positives, Positives)
        check_choice("denominator", self.denominator, Denominator)
        # As floats: tensors take no int beyond 64 bits.
        object.__setattr__(self, "hardness", check_range("hardness", self.hardness, 0, LARGEST_FLOAT32))
        object.__setattr__(self, "prior", check_range("prior", self.prior, 0, 1))

    @property
    def inner(self) -> bool:
        """Whether the mean over the positives stands inside the logarithm."""
        return self.positives == "in"

    @property
    def plain(self) -> bool:
        """Whether the denominator is that of all keys, each with its own weight."""
        return self.denominator == "all" and not self.hardness and not self.prior
