"""Room in which kernels of the CPU keep logits, or what became of them, that else would be made twice.

A traced graph has none: its backward pass would hold both what was kept and what it becomes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wscl_fast._ops.extension import compute_dtype

BYTES = 31 << 20  # of what the core keeps for the next step: fresh pages cost what is saved
MOST_KEYS = 1 << 18  # whose weights, of a panel of 48 rows, take 48 MiB in float32
_BLOCK, _LANES = 128, 16  # of the kernels: what a part may leave empty


def room_for_logits(queries: Tensor, keys: Tensor | None) -> int:
    """For how many numbers of logits a forward pass has room, for its backward pass; 0 where it would hold
    less than half of them. Without ``keys`` the queries are the keys, and half of the matrix is met.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not queries.is_cpu:
        return 0
    n, m = len(queries), len(queries if keys is None else keys)
    most = BYTES // compute_dtype(queries.dtype).itemsize
    if n * m > (4 if keys is None else 2) * most:
        return 0
    more, fewer = max(n, m) + _BLOCK * torch.get_num_threads(), min(n, m) + _LANES
    return min(most, more * fewer + _LANES)


def room_for_weights(keys: Tensor | None) -> bool:
    """Whether these keys' gradient may be made along with the loss, from weights of some rows at a time."""
    return (
        keys is not None
        and keys.requires_grad
        and not torch.compiler.is_compiling()
        and keys.is_cpu
        and keys.dtype in (torch.float32, torch.float64)
        and keys.shape[0] * keys.element_size() <= MOST_KEYS * 4
    )
