"""Two sides of one batch, images and texts say: the losses of CLIP and SigLIP, with clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wscl_fast import _ops, reference
from wscl_fast.functional import _block as blocks
from wscl_fast.functional._arrays import takes_arrays
from wscl_fast.functional._checks import (
    LARGEST_FLOAT32,
    check_all_finite,
    check_choice,
    check_device,
    check_matrix,
    check_number,
    check_vector,
)
from wscl_fast.functional._inputs import (
    Batch,
    Impl,
    Inputs,
    Reduction,
    no_autocast,
    prepare,
    reduce_rows,
    row_ids,
)
from wscl_fast.functional._passes import Passes, in_blocks
from wscl_fast.functional._requests import SoftplusSum, two_way_logsumexp
from wscl_fast.functional._variant import Positives
from wscl_fast.matching import add_gradients, dot, matching_count, matching_logits, products
from wscl_fast.pairs import Meets, Pairs
from wscl_fast.values import Unchanged

__all__ = ["clip_loss", "siglip_loss"]


@takes_arrays
def clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    x_clusters: Tensor | None = None,
    y_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    positives: Positives = "out",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """InfoNCE in both directions: each x among all y, and each y among all x.

    In plain PyTorch, where row i of one side belongs to row i of the other::

        logits = x @ y.T / temperature
        ids = torch.arange(len(x))
        loss = (F.cross_entropy(logits, ids) + F.cross_entropy(logits.T, ids)) / 2

    With clusters, all rows of the other side that have a row's id are its positives, each with an equal
    share of the target: captions that stand twice in a batch, or several captions of one image, are no
    negatives of their own twins. The sides need not be of one length then.

    Args:
        x: ``[N, d]``, floating point, used as it is: normalise it first for cosine similarities.
        y: ``[M, d]``, the other side.
        x_clusters: ``[N]`` int64; by default row i belongs to row i of the other side.
        y_clusters: ``[M]`` int64; by default ``x_clusters``.
        temperature: positive number or 0-dim tensor, which receives its exact gradient.
        positives: ``"out"`` or ``"in"``, as in :func:`wscl_fast.functional.clustered_infonce`.
        x_weights: ``[N]``, a weight for each row of ``x``.
        y_weights: ``[M]``, the same of ``y``.
        ignore_index: the id that says "no cluster": such a row is no one's positive or negative.
        reduction: ``"mean"`` is half the sum of the directions' means, ``"sum"`` half the sum of both
            (of each direction over the rows that have a positive); ``"none"`` the rows of ``x``, then
            those of ``y``, ``[N + M]``.
        impl: as in ``clustered_infonce``.

    Returns:
        0-dim tensor, or ``[N + M]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as ``clustered_infonce``.

    Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021
    (arXiv 2103.00020); the targets over clusters: Yang et al., *Unified Contrastive Learning in
    Image-Text-Label Space*, CVPR 2022 (arXiv 2204.03610).
    """
    check_choice("reduction", reduction, Reduction)
    x_clusters, y_clusters = check_sides(x, y, x_clusters, y_clusters, ignore_index)
    if isinstance(temperature, Tensor) and temperature.ndim:
        raise TypeError(f"temperature: expected a number or a 0-dim tensor, got shape {temperature.shape}")
    check_choice("positives", positives, Positives)
    _check_beside("temperature", temperature, x)
    batch = Batch(x, y, x_clusters, y_clusters, temperature, ignore_index)
    inputs, impl, _ = prepare(batch, impl, blocks=False)
    check_weights(x, y, x_weights, y_weights)
    with no_autocast(x):
        one, two = _clip_rows(inputs.pairs, positives == "in", impl)
        losses = [
            reduce_rows(*one, x_weights, reduction, name="x_weights"),
            reduce_rows(*two, y_weights, reduction, name="y_weights"),
        ]
        return torch.cat(losses) if reduction == "none" else (losses[0] + losses[1]) / 2


def _clip_rows(pairs: Pairs, inner: bool, impl: Impl) -> list[tuple[Tensor, Tensor]]:
    """Loss and positives' count of the rows of both sides: one similarity matrix serves both."""
    if impl == "reference":
        both = (pairs, pairs.swapped())
        return [reference.clustered_infonce(side, side, inner=inner) for side in both]
    fused = impl == "fused"
    large = any(in_blocks(side) for side in pairs[:2]) and all(side.requires_grad for side in pairs[:2])
    if fused and large and torch.is_grad_enabled():
        sums = _Sums.apply(pairs.queries, pairs.keys, pairs.scale, pairs, inner)  # type: ignore[no-untyped-call]
    else:
        sums = _sums(pairs.folded(), inner, fused)
    counts = matching_count(pairs), matching_count(pairs.swapped())
    return [
        (clip_rows(lse, own_kind, count, inner), count)
        for lse, own_kind, count in zip(sums[:2], sums[2:], counts, strict=True)
    ]


def _sums(pairs: Pairs, inner: bool, fused: bool) -> tuple[Tensor, ...]:
    """The log-sum-exps of both sides, and the sums over their own kind, as :func:`clip_rows` has them."""
    everyone = two_way_logsumexp(pairs, "all", fused=fused)
    if inner:
        return *everyone, *two_way_logsumexp(pairs, "same", fused=fused)
    return *everyone, matching_logits(pairs), matching_logits(pairs.swapped())


class _Sums(torch.autograd.Function):
    """:func:`_sums` by the kernels, with all gradients of a side in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, inner: bool
    ) -> tuple[Tensor, ...]:
        pairs = pairs._replace(queries=x, keys=y, scale=scale.detach())
        kinds: tuple[Meets, ...] = ("all", "same") if inner else ("all",)
        stats = [_ops.two_way_block(pairs, kind) for kind in kinds]
        values = [_ops.Block(side, side).lse().to(x.dtype) for sides in stats for side in sides]
        if not inner:
            values += [scale * products(side) for side in (pairs, pairs.swapped())]
        ctx.save_for_backward(x, y, scale, *(side for sides in stats for side in sides))
        ctx.unchanged = Unchanged(pairs.query_ids, pairs.key_ids, pairs.own)
        ctx.pairs, ctx.kinds = pairs._replace(queries=x.new_empty(0), keys=x.new_empty(0)), kinds
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *stats = ctx.saved_tensors
        ctx.unchanged.check()
        pairs = ctx.pairs._replace(queries=x, keys=y, scale=scale)
        with torch.no_grad():
            made = _gradients(pairs, ctx.kinds, stats, grads, ctx.needs_input_grad[2])
        if torch.is_grad_enabled():  # a graph of the gradients is asked for
            made = _ops.once("two_way_logsumexp", (x, y, scale, *grads), made)
        return *made, None, None


def _gradients(
    pairs: Pairs,
    kinds: tuple[Meets, ...],
    stats: list[Tensor],
    grads: tuple[Tensor, ...],
    of_scale: bool,
) -> tuple[Tensor | None, ...]:
    """Of both sides and, if asked for, the scale."""
    found = []
    for number, kind in enumerate(kinds):
        place = slice(2 * number, 2 * number + 2)
        rows, columns = (
            (side, torch.where(side[1] == 0, 0.0, grad))
            for side, grad in zip(stats[place], grads[place], strict=True)
        )
        found.append(blocks.two_way_backward(pairs, kind, rows, columns, fused=True))
    (of_x, of_y), *more = found
    for to_x, to_y in more:
        of_x.add_(to_x)
        of_y.add_(to_y)
    if len(kinds) == 1:
        add_gradients(pairs, pairs.scale * grads[2], of_x, of_y)
        add_gradients(pairs.swapped(), pairs.scale * grads[3], of_y, of_x)
    if not of_scale:
        return of_x, of_y, None
    return of_x, of_y, dot(pairs.queries, of_x).to(pairs.scale.dtype) / pairs.scale


def clip_rows(lse: Tensor, own_kind: Tensor, count: Tensor, inner: bool) -> Tensor:
    """The loss of rows; of their own kind, the log-sum-exp with ``inner``, else the sum of logits."""
    size = count.clamp(min=1).to(lse.dtype)
    numerator = own_kind.masked_fill(count == 0, 0) - size.log() if inner else own_kind / size
    return torch.where(count > 0, lse.masked_fill(count == 0, 0) - numerator, 0.0)


@takes_arrays
def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    x_clusters: Tensor | None = None,
    y_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Every pair of an x and a y on its own: a sigmoid says whether they belong together.

    In plain PyTorch, where row i of one side belongs to row i of the other::

        logits = x @ y.T / temperature + bias
        loss = -F.logsigmoid(logits * (2 * torch.eye(len(x)) - 1)).sum(1).mean()

    With clusters, pairs of one id belong together, all others do not. Half of the work is a sum over pairs
    of different ids; the pairs of one id are a small pass of their own, so that neither loses digits to the
    other.

    Args:
        x: ``[N, d]``, floating point, used as it is: normalise it first for cosine similarities.
        y: ``[M, d]``, the other side.
        x_clusters: ``[N]`` int64; by default row i belongs to row i of the other side.
        y_clusters: ``[M]`` int64; by default ``x_clusters``.
        temperature: positive number, or a tensor, 0-dim or ``[N]``, which receives its exact gradient.
        bias: a number, or a 0-dim tensor, which receives its exact gradient.
        weights: ``[N]``, a weight for each row of ``x``.
        ignore_index: the id that says "no cluster": such a row meets no one.
        reduction: ``"mean"`` (over the rows of ``x`` that have an id), ``"sum"`` or ``"none"`` (``[N]``).
        impl: as in :func:`wscl_fast.functional.clustered_infonce`.

    Returns:
        0-dim tensor, or ``[N]`` for ``reduction="none"``; float64 where an input is, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as ``clustered_infonce``.

    Source: Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, ICCV 2023 (arXiv 2303.15343).
    """
    check_choice("reduction", reduction, Reduction)
    x_clusters, y_clusters = check_sides(x, y, x_clusters, y_clusters, ignore_index)
    for name, value in (("temperature", temperature), ("bias", bias), ("weights", weights)):
        _check_beside(name, value, x)
    batch = Batch(x, y, x_clusters, y_clusters, temperature, ignore_index)
    loss, has_id = siglip_rows(batch, bias, impl=impl)
    return reduce_rows(loss, has_id, weights, reduction)


def siglip_rows(
    batch: Batch,
    bias: float | Tensor,
    *,
    impl: Impl = "auto",
    passes: Callable[[bool], Passes] = Passes,
) -> tuple[Tensor, Tensor]:
    """:func:`siglip_loss` of every row, neither weighted nor reduced, and which rows have an id."""
    inputs, impl, answers = prepare(batch, impl, passes)
    offset = _bias(bias, inputs)
    with no_autocast(batch.queries):
        pairs = answers.folded(inputs.pairs)
        turned = pairs._replace(scale=-pairs.scale)
        if impl == "reference":
            loss = reference.softplus_sum(pairs, "other", offset)
            loss = loss + reference.softplus_sum(turned, "same", -offset)
        else:
            apart, together = SoftplusSum(pairs, "other", offset), SoftplusSum(turned, "same", -offset)
            loss = sum(answers({"apart": apart, "together": together}).values(), torch.zeros_like(offset))
        return loss, pairs.query_ids != pairs.ignore_index


def check_sides(
    x: Tensor, y: Tensor, x_clusters: Tensor | None, y_clusters: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The ids of both sides; without any, row i belongs to row i."""
    for name, side in (("x", x), ("y", y)):
        check_matrix(name, side)
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y: expected {x.shape[1]} columns as in x, got shape {tuple(y.shape)}")
    check_device("y", y, x, other="x")
    if x_clusters is None:
        if y_clusters is not None:
            raise ValueError("y_clusters: expected None where x_clusters is None, got a tensor")
        x_clusters = row_ids(x, ignore_index)
    check_vector("x_clusters", x_clusters, len(x), x, integer=True, other="x")
    if y_clusters is None:
        if len(y) != len(x):
            raise ValueError(f"y: expected {len(x)} rows as in x where y_clusters is None, got {len(y)}")
        y_clusters = x_clusters
    check_vector("y_clusters", y_clusters, len(y), x, integer=True, other="x")
    return x_clusters, y_clusters


def check_weights(x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None) -> None:
    """Refuse what is not a weight for each row of its side."""
    for name, side, weights in (("x_weights", x, x_weights), ("y_weights", y, y_weights)):
        if weights is not None:
            check_vector(name, weights, len(side), x, integer=False, other="x")


def _check_beside(name: str, value: object, x: Tensor) -> None:
    """Refuse a tensor on another device than x. (What is common to all losses would say: than queries.)"""
    if isinstance(value, Tensor):
        check_device(name, value, x, other="x")


def _bias(bias: float | Tensor, inputs: Inputs) -> Tensor:
    """One for each row."""
    queries = inputs.pairs.queries
    if isinstance(bias, Tensor):
        if bias.ndim or not bias.is_floating_point():
            raise TypeError(
                "bias: expected a number or a floating-point 0-dim tensor,"
                f" got shape {tuple(bias.shape)}, {bias.dtype}"
            )
        check_device("bias", bias, queries)
        check_all_finite("bias", bias)
        return bias.to(queries.dtype).expand(len(queries))
    return queries.new_full((len(queries),), check_bias(bias))


def check_bias(bias: object) -> float:
    """A number that is finite in float32 too."""
    number = check_number("bias", bias, "a number or a tensor")
    if not -LARGEST_FLOAT32 <= number <= LARGEST_FLOAT32:
        raise ValueError(f"bias: expected a finite number, got {bias}")
    return number
