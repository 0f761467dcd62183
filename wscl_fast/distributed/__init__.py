"""Several processes as one: collectives over rows, and the losses over the batch of all ranks.

Rows are of one dtype and one size on all ranks, also where a rank has none.
"""

from __future__ import annotations

from wscl_fast.distributed.collectives import (
    broadcast,
    first_row,
    gather,
    rank,
    sum_over_ranks,
    world_size,
)
from wscl_fast.distributed.infonce import clustered_infonce
from wscl_fast.distributed.known import hierarchical_infonce, soft_infonce
from wscl_fast.distributed.shared import Gather
from wscl_fast.distributed.two_way import clip_loss, siglip_loss

__all__ = [
    "Gather",
    "broadcast",
    "clip_loss",
    "clustered_infonce",
    "first_row",
    "gather",
    "hierarchical_infonce",
    "rank",
    "siglip_loss",
    "soft_infonce",
    "sum_over_ranks",
    "world_size",
]
