"""The samples as clustering sees them: blocks of rows, of this process or of all ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from wscl_fast import distributed
from wscl_fast.clustering.arrays import FLOATS
from wscl_fast.clustering.base import check_choice
from wscl_fast.distributed.collectives import Group, alone, least_over_ranks, of_all_ranks
from wscl_fast.distributed.grouped import Grouped
from wscl_fast.functional.kmeans import Metric, kmeans_update

METRICS = get_args(Metric)
Square = TypeVar("Square", float, Tensor)

# Elements of a block that is made anew: it stays in a CPU's last cache, and fills a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_FAR = 256.0  # ‖mean‖² over the variance from where centroids are kept relative to the mean
_TAME = 2.0**40  # largest values between this and its inverse have squares to spare in float32


@dataclass(frozen=True)
class Ranks(Grouped):
    """The processes whose shards of rows make up the data; one process alone by default."""

    sharded: bool = False
    group: Group = None

    def __post_init__(self) -> None:
        if self.group is not None and not self.sharded:
            raise ValueError("group: expected None unless sharded=True")

    @property
    def size(self) -> int:
        """How many there are."""
        return distributed.world_size(self.group) if self.sharded else 1

    @property
    def alone(self) -> bool:
        """Whether this process has all rows."""
        return not self.sharded or alone(self.group)

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return distributed.rank(self.group) if self.sharded else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors."""
        return distributed.sum_over_ranks(tensor, self.group) if self.sharded else tensor

    def least(self, tensor: Tensor) -> Tensor:
        """The least of all ranks' numbers, each."""
        return least_over_ranks(tensor, self.group) if self.sharded else tensor

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows, in rank order."""
        return distributed.gather(rows, self.group) if self.sharded else rows

    def of_all(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of one shape and dtype, stacked."""
        return of_all_ranks(tensor, self.group) if self.sharded else tensor[None]

    def first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        return self.told(tensor, 0)

    def told(self, tensor: Tensor, source: int) -> Tensor:
        """A rank's tensor; the others give one of its shape and dtype."""
        return distributed.broadcast(tensor, source, self.group) if self.sharded else tensor


class Survey(NamedTuple):
    """What one pass over the samples tells."""

    variance: float  # mean variance of the columns, as seen
    n_directionless: int  # zero vectors, of all ranks
    lost: float  # their weight


@dataclass
class Frame:
    """How samples are seen: scaled by a power of two, then from an origin. Identity for tame data.

    Far from the origin a centroid in float32 loses the digits that tell clusters apart, and the squares of
    very large or small values leave float32's range; neither happens to what is seen.
    """

    scale: float = 1.0
    origin: Tensor | None = None  # [d], in the scaled units
    wild_lengths: bool = False  # cosine: some row's squares may overflow or vanish

    @property
    def plain(self) -> bool:
        """Whether samples are seen as they are."""
        return self.scale == 1 and self.origin is None and not self.wild_lengths

    def see(self, rows: Tensor) -> Tensor:
        """Rows as they are seen."""
        if self.wild_lengths:
            return unit(rows)
        if self.scale != 1:
            rows = rows * self.scale
        # From the very origin: where it is float64 and rows are not, its last digits count as well.
        return rows if self.origin is None else (rows - self.origin.to(rows.device)).to(rows.dtype)

    def unsee(self, rows: Tensor) -> Tensor:
        """The rows that are seen so."""
        if self.origin is not None:
            rows = rows + self.origin.to(rows)
        return rows / self.scale if self.scale != 1 else rows

    def unsee_square(self, square: Square) -> Square:
        """The squared distance that is seen so; the scale's own square may leave float64's range."""
        return square / self.scale / self.scale


class Points:
    """A matrix of samples in blocks, as `dtype` and as its frame sees them.

    Args:
        x: [n, d], this rank's rows.
        weights: float64 [n], or None: every sample counts once.
        metric: "euclidean" or "cosine"; when cosine the length of a row means nothing.
        ranks: whose rows make up the data.
        frame: how samples are seen; `settle` chooses one.
        alike: what the ranks have to agree about beside their samples, by name: plain values or a tensor.

    Raises:
        ValueError: on every rank, where they disagree about the features, float64 or what is to be `alike`.
    """

    in_memory = True

    def __init__(
        self,
        x: Tensor,
        *,
        weights: Tensor | None = None,
        metric: Metric = "euclidean",
        ranks: Ranks | None = None,
        frame: Frame | None = None,
        alike: Mapping[str, Any] | None = None,
    ) -> None:
        self.x, self.weights, self.metric = x, weights, metric
        self.ranks = ranks or Ranks()
        self.device = x.device
        self.n, self.dim = x.shape
        self.frame = frame or Frame()
        own = x.dtype if x.dtype in FLOATS else torch.float32
        told = {} if alike is None or self.ranks.alone else alike
        head = [self.n, self.dim, FLOATS.index(own), int(self.in_memory), *map(_mark, told.values())]
        heads = self.ranks.gather(torch.tensor([head], device=self.device)).tolist()
        sizes, dims, numbers, here, *marks = zip(*heads, strict=True)
        if len(set(dims)) > 1:
            raise ValueError(f"X: expected as many features on all ranks, got {list(dims)}")
        for (name, value), mark in zip(told.items(), marks, strict=True):
            if len(set(mark)) > 1:
                got = "arrays that differ" if isinstance(value, Tensor) else f"{value!r} on this one"
                raise ValueError(f"{name}: expected the same on all ranks, got {got}")
        # A rank without rows goes along with the others.
        dtypes = {FLOATS[number] for size, number in zip(sizes, numbers, strict=True) if size} or {own}
        if torch.float64 in dtypes and len(dtypes) > 1:
            raise ValueError(
                f"X: expected float64 on all ranks or on none, got {[FLOATS[i] for i in numbers]}"
            )
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.stored = next(iter(dtypes)) if len(dtypes) == 1 else self.dtype  # that can hold all ranks' rows
        self.n_all = sum(sizes)
        self.first_row = sum(sizes[: self.ranks.rank])  # of this rank among all
        self.all_in_memory = all(here)

    def raw(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive ranges of this rank's rows as they are stored: one, as they are in memory."""
        if self.n:
            yield slice(0, self.n), self.x

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive ranges of rows as the frame sees them: as long as can be without a copy."""
        return self.raw() if self.frame.plain else self.parts()

    def parts(self, width: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of rows, seen and as `dtype`, short enough for `width` (or d) columns to stay in a cache."""
        step = self.rows_at_once(width)
        for rows, block in self.raw():
            for start in range(0, len(block), step):
                part = block[start : start + step]
                first = rows.start + start
                yield slice(first, first + len(part)), self.seen(part).to(self.dtype)

    def rows_at_once(self, width: int = 0) -> int:
        """How many rows of `width` (or d) columns stay in a cache."""
        elements = BLOCK_ELEMENTS.get(self.device.type, BLOCK_ELEMENTS["cpu"])
        return max(64, elements // max(width, self.dim))

    def seen(self, rows: Tensor) -> Tensor:
        """Raw rows as this clustering sees them."""
        return rows if self.frame.plain else self.frame.see(rows.to(self.dtype))

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of this rank, as `blocks` gives them but in `dtype`."""
        return self.seen(self.x[index]).to(self.dtype)

    def rows_of_all(self, index: Tensor) -> Tensor:
        """Rows by their number among all ranks' rows, on every rank [len(index), d]."""
        if self.ranks.alone:
            return self.rows(index)
        local = index - self.first_row
        mine = (local >= 0) & (local < self.n)
        found = torch.zeros(len(index), self.dim, dtype=self.dtype, device=self.device)
        found[mine] = self.rows(local[mine])
        return self.ranks.sum(found)

    def identity(self) -> list[Any]:
        """What tells these samples from others, in plain values."""
        return [self.n_all, self.dim, digest(self.x), digest(self.weights)]

    def directions(self, rows: Tensor) -> Tensor:
        """Rows scaled to length 1 when cosine, as they are otherwise."""
        return unit(rows) if self.metric == "cosine" else rows

    def largest(self) -> float:
        """The largest number in all ranks' samples, but for its sign.

        Raises:
            ValueError: on every rank: no sample, none of a weight above 0, NaN or infinity on any of them.
        """
        if not self.n_all:
            raise ValueError("X: expected at least one sample, got none")
        largest = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, block in self.parts():
            low, high = block.aminmax()
            largest = torch.maximum(largest, torch.maximum(-low, high).double())
        weighs = self.n > 0 if self.weights is None else (self.weights > 0).any()
        own = torch.stack([largest, torch.as_tensor(weighs, device=self.device).double()])
        found, weight = self.ranks.of_all(own).amax(dim=0).tolist()
        if not math.isfinite(found):
            raise ValueError("X: expected finite numbers, got NaN or infinity")
        if not weight:
            raise ValueError("sample_weight: Sample weights must contain at least one non-zero number.")
        return float(found)

    def settle(self) -> Survey:
        """Look at all samples and choose the frame to see them in; if cosine, zero vectors lose their weight.

        Raises:
            ValueError: as `largest` does.
        """
        largest = self.largest()
        if self.metric == "euclidean" and largest > 0 and not 1 / _TAME < largest < _TAME:
            most = 1000 if self.dtype == torch.float64 else 126
            self.frame.scale = 2.0 ** min(-math.frexp(largest)[1], most)
        shift = self.directions(self.rows_of_all(torch.zeros(1, dtype=torch.int64, device=self.device)))
        total = torch.zeros(self.dim + 1, dtype=torch.float64, device=self.device)
        directionless = torch.zeros((), dtype=torch.int64, device=self.device)
        lost = total.new_zeros(())
        wild = torch.zeros((), dtype=torch.int64, device=self.device)
        for rows, raw in self.parts() if self.metric == "cosine" else self.blocks():
            block = self.directions(raw)
            if self.metric == "cosine":
                length = raw.abs().amax(dim=1)
                zero = length == 0
                wild += (~zero & ~((length > 1 / _TAME) & (length < _TAME))).sum()
                if bool(zero.any()):
                    directionless += zero.sum()
                    lost += self._without(rows, zero)
            one = kmeans_update(block, shift)  # of the one cluster of all samples: the sum, and Σ‖x − shift‖²
            total[:-1] += one.sums[0]
            total[-1] += one.inertia
        total = self.ranks.sum(total) / self.n_all
        mean, square = total[:-1], total[-1]
        variance = max(0.0, float(square - (mean - shift[0].double()).square().sum())) / self.dim
        if self.metric == "euclidean" and float(mean.square().mean()) > _FAR * variance:
            self.frame.origin = mean.to(self.dtype)
        self.frame.wild_lengths = bool(self.ranks.sum(wild) > 0)
        n_directionless = int(self.ranks.sum(directionless))
        if int(self.ranks.sum(torch.tensor(int(self.weights is not None), device=self.device))):
            self._weigh()  # where another rank's rows have weights
        return Survey(variance, n_directionless, float(self.ranks.sum(lost)))

    def _without(self, rows: slice, zero: Tensor) -> Tensor:
        """Take some rows' weight, and tell how much it was."""
        weights = self._weigh()
        lost = weights[rows][zero].sum()
        weights[rows] = weights[rows].where(~zero, 0)
        return lost

    def _weigh(self) -> Tensor:
        if self.weights is None:
            self.weights = torch.ones(self.n, dtype=torch.float64, device=self.device)
        return self.weights


def unit(rows: Tensor) -> Tensor:
    """Rows at length 1, whatever their scale; zero rows stay zero."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    return normalize(rows / largest.where(largest > 0, 1), dim=1, eps=0.5)


def _mark(value: Any) -> int:
    """A number that tells a plain value, or a tensor's numbers whatever their dtype, from others."""
    text = f"{list(value.shape)} {digest(value, torch.float64)}" if isinstance(value, Tensor) else str(value)
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def digest(rows: Tensor | None, dtype: torch.dtype | None = None) -> str:
    """What tells numbers from others, by all of their bytes (those of `dtype` if given); of None too."""
    found = blake2b(digest_size=16)
    if rows is not None and rows.numel():
        step = max(1, BLOCK_ELEMENTS["cpu"] * len(rows) // rows.numel())
        for part in torch.split(rows.detach(), step):
            found.update(part.to("cpu", dtype or part.dtype).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_metric(metric: str) -> Metric:
    """The metric, if it is one."""
    check_choice(metric, "metric", METRICS)
    return metric  # type: ignore[return-value]
