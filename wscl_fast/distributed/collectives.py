"""Collectives over the rows of tensors. Without a process group every one of them is that of one process.

Ranks may hold different numbers of rows, none included: a short message tells the numbers first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wscl_fast.functional._checks import check_id

__all__ = [
    "Group",
    "agree",
    "alone",
    "broadcast",
    "first_row",
    "gather",
    "largest_over_ranks",
    "least_over_ranks",
    "rank",
    "rows_of_ranks",
    "sum_over_ranks",
    "sum_to_rank",
    "world_size",
]

# A process group, or None for all processes. (The class is missing where PyTorch was built without one.)
Group = Any


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """The number of processes; 1 where no process group was started.

    Args:
        group: the process group; by default all processes.

    Raises:
        TypeError: ``group`` is no process group.
    """
    _check_group(group)
    return dist.get_world_size(group) if _initialised() else 1


def rank(group: Group = None) -> int:
    """The number of this process among them; 0 where no process group was started.

    Args:
        group: the process group; by default all processes.

    Raises:
        TypeError: ``group`` is no process group.
    """
    _check_group(group)
    return dist.get_rank(group) if _initialised() else 0


def _check_group(group: Group) -> None:
    """Refuse what is no process group: one process would never look at it."""
    if group is None:
        return
    there = dist.is_available()
    # A process that is not in a group has a number in its place.
    if not (there and (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER)):
        raise TypeError(
            f"group: expected a process group of torch.distributed or None, got {type(group).__name__}"
        )


def _check_tensor(tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a tensor, got {type(tensor).__name__}")


def _check_rows(tensor: Tensor) -> None:
    _check_tensor(tensor)
    if tensor.ndim == 0:
        raise ValueError("tensor: expected rows [N, ...], got a 0-dim tensor")


def alone(group: Group = None) -> bool:
    """Whether there is nobody to talk to: one process has what all have."""
    return world_size(group) == 1


def sum_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum of all ranks' tensors of one shape, the same bits on every rank. No gradient comes back.

    Args:
        tensor: of one shape and dtype on all ranks; it is left as it is.
        group: the process group; by default all processes.

    Raises:
        TypeError: ``tensor`` is not a tensor.
    """
    return _exchanged(tensor, group, lambda copy: dist.all_reduce(copy, group=group))


def sum_to_rank(tensor: Tensor, to: int, group: Group = None) -> Tensor:
    """The sum of all ranks' tensors of one shape, on rank ``to``; others get what means nothing."""
    return _exchanged(tensor, group, lambda copy: dist.reduce(copy, peer(to, group), group=group))


def least_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """The least of all ranks' numbers, each; tensors of one shape. No gradient comes back."""
    return _exchanged(tensor, group, lambda copy: dist.all_reduce(copy, dist.ReduceOp.MIN, group=group))


def broadcast(tensor: Tensor, source: int = 0, group: Group = None) -> Tensor:
    """Rank ``source``'s tensor, on every rank. No gradient comes back.

    Args:
        tensor: of one shape and dtype on all ranks; it is left as it is.
        source: whose, by its number in the group.
        group: the process group; by default all processes.

    Raises:
        TypeError: ``tensor`` is not a tensor, or ``source`` not an int.
        ValueError: there is no such rank.
    """
    if not 0 <= check_id("source", source) < world_size(group):
        raise ValueError(f"source: expected a rank from 0 to {world_size(group) - 1}, got {source}")
    return _exchanged(tensor, group, lambda copy: dist.broadcast(copy, peer(source, group), group=group))


def _exchanged(tensor: Tensor, group: Group, in_place: Callable[[Tensor], Any]) -> Tensor:
    """What a collective that works in place makes of a copy; with one rank nothing is copied."""
    _check_tensor(tensor)
    tensor = tensor.detach()
    if alone(group):
        return tensor
    copy = tensor.clone(memory_format=torch.contiguous_format)
    in_place(copy)
    return copy


def gather(tensor: Tensor, group: Group = None) -> Tensor:
    """All ranks' rows, in rank order, on every rank; gradients come back to the rank that gave a row.

    In plain PyTorch, where the ranks' tensors lie in one process: ``torch.cat(tensors)``. The backward pass
    sums over the ranks what each of them asks of a row, so the gradient is that of the sum of all ranks'
    losses, exactly as one process with the whole batch has it. Ranks may give different numbers of rows.

    If any rank's tensor requires a gradient, the result does on every rank, and every rank must run the
    backward pass.

    Args:
        tensor: ``[N, ...]``, any dtype; trailing dimensions alike on all ranks.
        group: the process group; by default all processes.

    Returns:
        ``[sum of all N, ...]``.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ValueError: it has no rows to gather (0-dim), or the ranks disagree about a row's size.
    """
    _check_rows(tensor)
    if alone(group):
        return tensor
    rows, wanted = rows_of_ranks(tensor, group)
    if not wanted:
        return _gather(tensor.detach(), rows, group)
    return _Gather.apply(agree(tensor), rows, group)  # type: ignore[no-untyped-call,no-any-return]


def rows_of_ranks(tensor: Tensor, group: Group) -> tuple[list[int], bool]:
    """How many rows every rank has, and whether any rank's tensor wants a gradient."""
    width = tensor[:1].numel() if len(tensor) else tensor.new_empty(1, *tensor.shape[1:]).numel()
    wants = torch.is_grad_enabled() and tensor.requires_grad
    mine = torch.tensor([len(tensor), width, int(wants)], device=tensor.device)
    heads = torch.cat(_equal(mine, group)).view(-1, 3).tolist()
    if len({width for _, width, _ in heads}) > 1:
        raise ValueError(
            f"tensor: expected rows of one size on all ranks, got {[width for _, width, _ in heads]} elements"
        )
    return [length for length, _, _ in heads], any(wants for *_, wants in heads)


def largest_over_ranks(values: Tensor, group: Group = None) -> Tensor:
    """The largest of all ranks' numbers ``[K]``, each; its gradient comes back to the rank that has it."""
    return values if alone(group) else gather(values[None], group).amax(0)


def first_row(tensor: Tensor, group: Group = None) -> int:
    """The number that this rank's first row has among the rows of all ranks.

    Args:
        tensor: this rank's rows ``[N, ...]``.
        group: the process group; by default all processes.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ValueError: it has no rows (0-dim), or the ranks disagree about a row's size.
    """
    _check_rows(tensor)
    if alone(group):
        return 0
    return sum(rows_of_ranks(tensor.detach(), group)[0][: rank(group)])


def agree(tensor: Tensor) -> Tensor:
    """The same values, with a place in the graph even where this rank alone would have none.

    A rank without a gradient of its own (an empty batch, say) still takes its turn in the backward pass:
    were it absent, the others would wait for it.
    """
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def peer(number: int, group: Group) -> int:
    """The number among all processes of a rank of the group."""
    return number if group is None else dist.get_global_rank(group, number)


def _equal(tensor: Tensor, group: Group) -> list[Tensor]:
    """All ranks' tensors of one shape."""
    parts = [torch.empty_like(tensor) for _ in range(world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


def _gather(tensor: Tensor, rows: list[int], group: Group) -> Tensor:
    longest = max(rows)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return torch.cat([part[:length] for part, length in zip(_equal(padded, group), rows, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: list[int], group: Group) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return _gather(tensor, rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.rows, ctx.group), None, None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """The transpose of :class:`_Gather`: each rank gets the sum of all ranks' values for its own rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: list[int], group: Group) -> Tensor:
        ctx.rows, ctx.group = rows, group
        # Each rank gets its own rows from every rank and adds them in rank order: half the traffic of an
        # all-reduce, the same bits every time, and any dtype.
        mine, size = rows[rank(group)], world_size(group)
        asked = values.new_empty(size * mine, *values.shape[1:])
        dist.all_to_all_single(asked, values.contiguous(), [mine] * size, rows, group=group)
        return asked.view(size, mine, *values.shape[1:]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.rows, ctx.group), None, None  # type: ignore[no-untyped-call]
