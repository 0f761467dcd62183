"""The extension's operators: loading, fake kernels, autograd. The only user of ``torch.ops.wscl_fast``."""

from __future__ import annotations

from wscl_fast._ops.extension import extension, load_error, serves, serves_device
from wscl_fast._ops.infonce import Reduction, clustered_infonce, reduced_infonce
from wscl_fast._ops.kmeans import (
    MOST_TOP,
    kmeans_assign,
    kmeans_distances,
    kmeans_potentials,
    kmeans_serves,
    kmeans_update,
    kmeans_update_bounded,
)
from wscl_fast._ops.logsumexp import (
    Block,
    logsumexp,
    logsumexp_block,
    logsumexp_block_backward,
    merge_blocks,
    softmax,
)
from wscl_fast._ops.registration import is_eager, once
from wscl_fast._ops.softplus import SoftplusBlock, softplus_block, softplus_block_backward, softplus_sum
from wscl_fast._ops.tags import tag_weighted_sum
from wscl_fast._ops.two_way import two_way_block, two_way_block_backward, two_way_logsumexp

__all__ = [
    "MOST_TOP",
    "Block",
    "Reduction",
    "SoftplusBlock",
    "clustered_infonce",
    "extension",
    "is_eager",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_potentials",
    "kmeans_serves",
    "kmeans_update",
    "kmeans_update_bounded",
    "load_error",
    "logsumexp",
    "logsumexp_block",
    "logsumexp_block_backward",
    "merge_blocks",
    "once",
    "reduced_infonce",
    "serves",
    "serves_device",
    "softmax",
    "softplus_block",
    "softplus_block_backward",
    "softplus_sum",
    "tag_weighted_sum",
    "two_way_block",
    "two_way_block_backward",
    "two_way_logsumexp",
]
