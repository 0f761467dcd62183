"""Samples as clustering sees them, wherever they are: in memory, or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from wscl_fast.clustering.arrays import as_samples, as_weights
from wscl_fast.clustering.files import FeatureFiles
from wscl_fast.clustering.points import Frame, Points, Ranks, digest
from wscl_fast.functional.kmeans import Metric


class StreamedPoints(Points):
    """Samples that are read from files block by block in every pass."""

    in_memory = False
    x: FeatureFiles  # type: ignore[assignment]

    def raw(self) -> Iterator[tuple[slice, Tensor]]:
        """The blocks of the files."""
        return self.x.blocks()

    def rows(self, index: Tensor) -> Tensor:
        """Some rows, each read on its own."""
        return self.seen(self.x.take(index)).to(self.dtype)

    def identity(self) -> list[Any]:
        """The files' names, sizes and times, and what the weights are."""
        return [*self.x.fingerprint(), digest(self.weights)]


def as_points(
    X: Any,
    *,
    sample_weight: Any = None,
    metric: Metric = "euclidean",
    ranks: Ranks | None = None,
    frame: Frame | None = None,
    least: int = 1,
    alike: Mapping[str, Any] | None = None,
) -> tuple[Points, Callable[[Tensor], Any]]:
    """What a user handed over as samples, and the way back from a tensor to its kind (numpy for files).

    `least` is of samples, and of those with a weight above 0; `alike` as of `Points`.
    """
    if isinstance(X, FeatureFiles):
        weights = as_weights(sample_weight, X, least=least)
        files: Any = X
        points = StreamedPoints(files, weights=weights, metric=metric, ranks=ranks, frame=frame, alike=alike)
        return points, lambda t: t.cpu().numpy()
    x, give = as_samples(X, "X", least=least)
    weights = as_weights(sample_weight, x, least=least)
    return Points(x, weights=weights, metric=metric, ranks=ranks, frame=frame, alike=alike), give
