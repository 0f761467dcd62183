"""Room in which a forward pass leaves its logits, so that the backward pass need not make them again."""

from __future__ import annotations

import torch
from torch import Tensor

from wscl_fast._ops.extension import compute_dtype

BYTES = 31 << 20  # of what the core keeps for the next step: fresh pages cost what is saved
_BLOCK, _LANES = 128, 16  # of the kernels: what a part may leave empty


def room_for_logits(queries: Tensor, keys: Tensor | None) -> int:
    """Of how many numbers; 0 where it would hold less than half of the logits, or where there are no kernels
    that use it. Without ``keys`` the queries are the keys, and half of the matrix is met.

    A traced graph has none.
    """
    if not torch.is_grad_enabled() or queries.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    n, m = len(queries), len(queries if keys is None else keys)
    most = BYTES // compute_dtype(queries.dtype).itemsize
    if n * m > (4 if keys is None else 2) * most:
        return 0
    more, fewer = max(n, m) + _BLOCK * torch.get_num_threads(), min(n, m) + _LANES
    return min(most, more * fewer + _LANES)
