"""The public functions in plain PyTorch, block by block, for any device and any dtype."""

from __future__ import annotations

from wscl_fast.chunked.infonce import (
    largest_pair_loss,
    logsumexp,
    logsumexp_of_logsigmoid,
    pair_losses,
    row_blocks,
    softmax,
    softplus_sum,
)
from wscl_fast.chunked.kmeans import kmeans_assign, kmeans_distances, kmeans_potentials, kmeans_update
from wscl_fast.chunked.soft import factor_product, factor_sums, only, weighted_logsumexp, weighted_sum

__all__ = [
    "factor_product",
    "factor_sums",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_potentials",
    "kmeans_update",
    "largest_pair_loss",
    "logsumexp",
    "logsumexp_of_logsigmoid",
    "only",
    "pair_losses",
    "row_blocks",
    "softmax",
    "softplus_sum",
    "weighted_logsumexp",
    "weighted_sum",
]
