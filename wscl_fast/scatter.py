"""Rows added to rows, in the same order in every run."""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_rows"]


def add_rows(sums: Tensor, places: Tensor, rows: Tensor) -> None:
    """`sums.index_add_(0, places, rows)`, in the same order in every run."""
    if sums.is_cuda:  # sorted, which atomic additions are not
        sums.index_put_((places,), rows, accumulate=True)
    else:
        sums.index_add_(0, places, rows)
