"""What PyTorch must know of an operator beside its kernels: shapes without values, and gradients.

A registered operator may be called as any other. Where nothing but eager mode is at work, what `register` and
`register_backward` return does the same in less time: PyTorch's general way to a gradient that is written in
Python costs 40 µs a call, and 7 where there is none to be had.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wscl_fast._ops.extension import extension

Fake = Callable[..., Any]
Operator = Callable[..., Any]

# PyTorch has no public name for these; without them all calls take the general way.
_below_autograd: Callable[[], AbstractContextManager[None]] | None = getattr(
    torch._C, "_AutoDispatchBelowAutograd", None
)
_are_transforms_active: Callable[[], bool] | None = getattr(
    torch._C, "_are_functorch_transforms_active", None
)


def register_fake(operator: str, fake: Fake) -> None:
    """Register an operator's fake kernel, whose parameters are the operator's (the last ones may be ``*``).

    Raises:
        ImportError: the extension has no such operator, since it was built from other sources.
    """
    found = getattr(torch.ops.wscl_fast, operator, None)
    takes = [argument.name for argument in found.default._schema.arguments] if found else []
    expected = inspect.getfullargspec(fake)
    if not found or takes[: len(expected.args) if expected.varargs else None] != expected.args:
        raise ImportError(
            f"wscl_fast: {getattr(extension, '__file__', None)} was built from other sources"
            f" (its operator {operator} {'is another' if found else 'is missing'}):"
            " install wscl-fast anew to build it again"
        )
    torch.library.register_fake(f"wscl_fast::{operator}", fake)


def register(
    operator: str,
    fake: Fake,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    tensors: int,
    options: int,
    results: int = 1,
) -> Operator:
    """Register an operator's fake kernel and its gradient, which ``backward(ctx, *gradients)`` gives.

    The operator's inputs are ``tensors`` tensors, then ``options`` values which the backward pass is given
    too, then what only the forward pass reads. Of its outputs the first ``results`` have a gradient. The
    backward pass finds the tensors and the other outputs in ``ctx.saved_tensors``, the options in
    ``ctx.options``. A single result without a gradient from above has None.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[tensors : tensors + options]
        ctx.mark_non_differentiable(*output[results:])
        ctx.set_materialize_grads(results > 1)
        ctx.save_for_backward(*inputs[:tensors], *output[results:])

    def backward_once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        # A graph of the gradients is asked for; what was kept for them hangs on the inputs unbeknown to it.
        zero = _Refusal.apply(operator, *ctx.saved_tensors[:tensors])  # type: ignore[no-untyped-call]
        made = backward(ctx, *grads)
        return tuple(None if grad is None else grad + zero.to(grad.dtype) for grad in made)

    return _register(operator, fake, backward_once, setup_context, tensors)


def register_backward(operator: str, fake: Fake) -> Operator:
    """Register an operator that computes gradients: it has a fake kernel, and refuses a second derivative."""

    def refuse(ctx: Any, *_: Tensor) -> NoReturn:
        _refuse_second_derivative(operator)

    return _register(operator, fake, refuse, lambda ctx, inputs, output: None, None)


def _register(
    operator: str,
    fake: Fake,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    tensors: int | None,
) -> Operator:
    """``tensors`` of the first inputs may be; None: any."""
    if extension is None:
        return _absent
    name = f"wscl_fast::{operator}"
    register_fake(operator, fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    overload: Operator = getattr(torch.ops.wscl_fast, operator).default
    below_autograd = _below_autograd
    if below_autograd is None or _are_transforms_active is None:
        return overload

    def forward(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            output = overload(*inputs)
        setup_context(ctx, inputs, output)
        return output

    of_gradient = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator, (torch.autograd.Function,), of_gradient)

    def call(*inputs: Any) -> Any:
        _refuse_tangents(operator, inputs)
        if not is_eager():
            return overload(*inputs)
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs[:tensors]
        ):
            return function.apply(*inputs)
        with below_autograd():
            return overload(*inputs)

    return call


def is_eager() -> bool:
    """Whether the extension is there and nothing but eager mode is at work: no tracing, no transforms."""
    return (
        extension is not None
        and _are_transforms_active is not None
        and not torch.compiler.is_compiling()
        and not _are_transforms_active()
    )


def once(
    operator: str, hangs_on: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients, in a graph where they hang on these tensors and refuse a second derivative."""
    made: tuple[Tensor | None, ...] = _Once.apply(  # type: ignore[no-untyped-call]
        operator, len(grads), *hangs_on, *grads
    )
    return made


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.operator = operator
        return tuple(None if grad is None else grad.view_as(grad) for grad in inputs[-count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        _refuse_second_derivative(ctx.operator)


class _Refusal(torch.autograd.Function):
    """Nothing, 0, to be added to what hangs on these tensors: who asks for its derivative in them is refused.

    Other derivatives, in weights of the rows say, do not pass through here.
    """

    @staticmethod
    def forward(ctx: Any, operator: str, queries: Tensor, *others: Tensor | None) -> Tensor:
        ctx.operator = operator
        return queries.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        _refuse_second_derivative(ctx.operator)


def _refuse_second_derivative(operator: str) -> NoReturn:
    raise NotImplementedError(
        f"wscl_fast::{operator}: the fused kernels have no second derivative;"
        " impl='chunked' and impl='reference' have"
    )


def _refuse_tangents(operator: str, inputs: tuple[Any, ...]) -> None:
    """Forward mode: what PyTorch does with an operator that has no rule is to lose the tangent."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", -1) < 0:
        return
    for value in inputs:
        if not isinstance(value, Tensor):
            continue
        if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"wscl_fast::{operator}: the fused kernels have no forward-mode derivative;"
                " impl='reference' has"
            )


def _absent(*_: Any) -> NoReturn:
    raise RuntimeError("the extension is not built")
