"""The public functions over tensors, one file for each."""

from __future__ import annotations

from wscl_fast.functional.infonce import Impl, Positives, Reduction, clustered_infonce

__all__ = ["Impl", "Positives", "Reduction", "clustered_infonce"]
