"""Problems that many tests share: every shape of the loss's arguments, from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of ``clustered_infonce`` in float64; ``arguments`` casts them for one call."""

    queries: Tensor
    keys: Tensor | None
    temperature: Tensor
    options: dict[str, Any]

    def arguments(self, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        """The tensors that want a gradient, and all arguments by name."""
        leaves = {"queries": self.queries, "temperature": self.temperature}
        if self.keys is not None:
            leaves["keys"] = self.keys
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in leaves.items()}
        return list(leaves.values()), {**leaves, **self.options}


def problem(
    n: int,
    m: int | None,
    d: int,
    *,
    positives: str = "out",
    clusters: int = 5,
    ignored: bool = True,
    exclude: bool | str | None = None,
    temperature: float = 0.2,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Problem:
    """``m=None`` is the in-batch case; ``exclude="own"`` names a random own key for each query."""
    generator = torch.Generator().manual_seed(seed)
    low = -1 if ignored else 0

    def vectors(rows: int) -> Tensor:
        return magnitude * torch.randn(rows, d, generator=generator, dtype=torch.float64) / d**0.5

    def ids(rows: int) -> Tensor:
        return torch.randint(low, clusters, (rows,), generator=generator)

    options: dict[str, Any] = {"query_clusters": ids(n), "positives": positives}
    keys = None
    if m is not None:
        keys = vectors(m)
        options["key_clusters"] = ids(m)
    if exclude == "own":
        assert m is not None
        options["exclude_self"] = torch.randint(-1, max(m, 1), (n,), generator=generator)
    elif exclude is not None:
        options["exclude_self"] = exclude
    return Problem(vectors(n), keys, torch.tensor(temperature, dtype=torch.float64), options)


def problems() -> Iterator[tuple[str, Problem]]:
    """A name and a problem for every combination that takes a path of its own."""
    for positives in ("out", "in"):
        shapes = ((1, 1, 4), (1, 300, 33), (127, 129, 40), (129, 127, 64), (200, 1500, 128), (70, 40, 130))
        for n, m, d in shapes:
            for exclude in (None, "own"):
                name = f"{positives}-{n}x{m}x{d}-{exclude}"
                yield name, problem(n, m, d, positives=positives, exclude=exclude)
        for n, d in ((1, 4), (2, 3), (127, 40), (129, 64), (300, 128)):
            for exclude in (None, False):
                yield (
                    f"{positives}-{n}x{d}-{exclude}",
                    problem(n, None, d, positives=positives, exclude=exclude),
                )
        for temperature in (0.005, 0.07, 10.0):
            yield (
                f"{positives}-tau{temperature}",
                problem(60, 90, 32, positives=positives, temperature=temperature),
            )
            yield (
                f"{positives}-batch-tau{temperature}",
                problem(90, None, 32, positives=positives, temperature=temperature),
            )
        yield (
            f"{positives}-logits-1e4",
            problem(60, 90, 16, positives=positives, temperature=0.01, magnitude=10),
        )
        yield f"{positives}-one-cluster", problem(64, 80, 16, positives=positives, clusters=1, ignored=False)
        yield f"{positives}-singletons", problem(64, None, 16, positives=positives, clusters=10**6)
        yield f"{positives}-no-positive", problem(0, 5, 8, positives=positives)
        yield f"{positives}-no-key", problem(5, 0, 8, positives=positives)
        yield f"{positives}-empty-batch", problem(0, None, 8, positives=positives)
