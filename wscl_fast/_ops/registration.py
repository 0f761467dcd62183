"""What PyTorch must know of an operator beside its kernels: shapes without values, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from wscl_fast._ops.extension import extension

Fake = Callable[..., Any]


def register(
    operator: str,
    fake: Fake,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    tensors: int,
    options: int,
    results: int = 1,
) -> None:
    """Register an operator's fake kernel and its gradient, which ``backward(ctx, *gradients)`` gives.

    The operator's inputs are ``tensors`` tensors, then ``options`` values which the backward pass is given
    too, then what only the forward pass reads. Of its outputs the first ``results`` have a gradient. The
    backward pass finds the tensors and the other outputs in ``ctx.saved_tensors``, the options in
    ``ctx.options``. A single result without a gradient from above has None.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[tensors : tensors + options]
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(results > 1)
        ctx.save_for_backward(*inputs[:tensors], *output[results:])

    if extension is not None:
        name = f"wscl_fast::{operator}"
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=setup_context)


def register_backward(operator: str, fake: Fake) -> None:
    """Register an operator that computes gradients: it has a fake kernel, and refuses a second derivative."""

    def refuse(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"wscl_fast::{operator}: the fused kernels have no second derivative;"
            " impl='chunked' and impl='reference' have"
        )

    if extension is not None:
        name = f"wscl_fast::{operator}"
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, refuse)
