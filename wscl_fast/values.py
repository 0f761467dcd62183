"""Whether the values of a tensor may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_fake", "may_look"]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at (meta, fake)."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def may_look(tensor: Tensor) -> bool:
    """Whether looking costs nothing: it would stall a GPU, and break a graph that is being traced."""
    return not torch.compiler.is_compiling() and tensor.is_cpu and not is_fake(tensor)
