"""Whether the values of a tensor may be looked at, and whether they are still what they were."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Unchanged", "is_fake", "may_look"]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at (meta, fake)."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def may_look(tensor: Tensor) -> bool:
    """Whether looking costs nothing: it would stall a GPU, and break a graph that is being traced."""
    return not torch.compiler.is_compiling() and tensor.is_cpu and not is_fake(tensor)


class Unchanged:
    """Tensors that a backward pass reads as they were before, where autograd does not watch them."""

    def __init__(self, *tensors: Tensor | None) -> None:
        traced = torch.compiler.is_compiling()
        watched = [t for t in tensors if t is not None and not traced and not t.is_inference()]
        self._seen = [(tensor, tensor._version) for tensor in watched]

    def check(self) -> None:
        """Refuse if one was written to."""
        for tensor, version in self._seen:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, that the gradient needs has"
                    " been modified by an inplace operation: change a copy, or change it after the"
                    " backward pass"
                )
