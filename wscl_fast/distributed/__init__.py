"""Several processes as one: collectives over rows, and the loss over the batch of all ranks."""

from __future__ import annotations

from wscl_fast.distributed.collectives import (
    broadcast,
    first_row,
    gather,
    rank,
    sum_over_ranks,
    world_size,
)
from wscl_fast.distributed.infonce import Gather, clustered_infonce

__all__ = [
    "Gather",
    "broadcast",
    "clustered_infonce",
    "first_row",
    "gather",
    "rank",
    "sum_over_ranks",
    "world_size",
]
