"""Collectives over the rows of tensors. Without a process group every one of them is that of one process.

Ranks may hold different numbers of rows, none included: a short message tells the numbers first, and what a
row is, which has to be alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wscl_fast.functional._checks import check_id
from wscl_fast.functional._inputs import no_autocast

__all__ = [
    "Group",
    "agree",
    "alone",
    "broadcast",
    "check_alike",
    "dtype_number",
    "dtype_of",
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
        ValueError: this process is not in the group, as in every function here that takes one.
    """
    _check_group(group)
    return _of_member(dist.get_world_size(group)) if _initialised() else 1


def rank(group: Group = None) -> int:
    """The number of this process among them; 0 where no process group was started.

    Args:
        group: the process group; by default all processes.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process is not in the group.
    """
    _check_group(group)
    return _of_member(dist.get_rank(group)) if _initialised() else 0


def _of_member(number: int) -> int:
    """What a group says of itself to its processes; to all others, whose calls it would ignore, −1."""
    if number < 0:
        raise ValueError("group: expected a process group that has this process, got one that has not")
    return number


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


def _check_tensor(tensor: object, name: str = "tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_rows(tensor: Tensor, name: str) -> None:
    _check_tensor(tensor, name)
    if tensor.ndim == 0:
        raise ValueError(f"{name}: expected rows [N, ...], got a 0-dim tensor")


def alone(group: Group = None) -> bool:
    """Whether there is nobody to talk to: one process has what all have."""
    return world_size(group) == 1


def sum_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum of all ranks' tensors of one shape and dtype, the same bits on every rank, in a new tensor.

    No gradient comes back.

    Args:
        tensor: of one shape and dtype on all ranks; it is left as it is.
        group: the process group; by default all processes.

    Raises:
        TypeError: ``tensor`` is not a tensor.
    """
    return _exchanged(tensor, group, lambda copy: dist.all_reduce(copy, group=group))


def sum_to_rank(tensor: Tensor, to: int, group: Group = None) -> Tensor:
    """The sum of all ranks' tensors of one shape and dtype, on rank ``to``; others get what means nothing."""
    return _exchanged(tensor, group, lambda copy: dist.reduce(copy, peer(to, group), group=group))


def least_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """The least of all ranks' numbers, each; tensors of one shape and dtype. No gradient comes back."""
    return _exchanged(tensor, group, lambda copy: dist.all_reduce(copy, dist.ReduceOp.MIN, group=group))


def of_all_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """All ranks' tensors along a new first dimension; of one shape and dtype. No gradient comes back.

    Nothing is said about rows first, so this takes one message where ``gather`` takes two.
    """
    return tensor[None] if alone(group) else torch.stack(_equal(tensor.detach().contiguous(), group))


def broadcast(tensor: Tensor, source: int = 0, group: Group = None) -> Tensor:
    """Rank ``source``'s tensor, in a new one on every rank. No gradient comes back.

    Args:
        tensor: of one shape and dtype on all ranks; it is left as it is.
        source: the rank whose numbers all get, by its number in the group.
        group: the process group; by default all processes.

    Raises:
        TypeError: ``tensor`` is not a tensor, or ``source`` not an int.
        ValueError: there is no such rank.
    """
    if not 0 <= check_id("source", source) < world_size(group):
        raise ValueError(f"source: expected a rank from 0 to {world_size(group) - 1}, got {source}")
    return _exchanged(tensor, group, lambda copy: dist.broadcast(copy, peer(source, group), group=group))


def _exchanged(tensor: Tensor, group: Group, in_place: Callable[[Tensor], Any]) -> Tensor:
    """What a collective that works in place makes of a copy, which one rank alone has as well."""
    _check_tensor(tensor)
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if not alone(group):
        in_place(copy)
    return copy


def gather(tensor: Tensor, group: Group = None, name: str = "tensor") -> Tensor:
    """All ranks' rows, in rank order, on every rank; gradients come back to the rank that gave a row.

    In plain PyTorch, where the ranks' tensors lie in one process: ``torch.cat(tensors)``. The backward pass
    sums over the ranks what each of them asks of a row, so the gradient is that of the sum of all ranks'
    losses, exactly as one process with the whole batch has it. Ranks may give different numbers of rows.

    If any rank's tensor requires a gradient, the result does on every rank, and every rank must run the
    backward pass.

    Args:
        tensor: ``[N, ...]``, of any dtype that the group's backend carries (gloo has no int16 and no float8);
            dtype and trailing dimensions alike on all ranks, those without rows included.
        group: the process group; by default all processes.
        name: what errors call the tensor.

    Returns:
        ``[sum of all N, ...]``; with one process ``tensor`` itself.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ValueError: it has no rows to gather (0-dim), or, on all ranks, they disagree about a row's shape
            or dtype.
    """
    _check_rows(tensor, name)
    if alone(group):
        return tensor
    rows, wanted = rows_of_ranks(tensor, group, name)
    if not wanted:
        return _gather(tensor.detach(), rows, group)
    return _Gather.apply(agree(tensor), rows, group)  # type: ignore[no-untyped-call,no-any-return]


def rows_of_ranks(
    tensor: Tensor, group: Group, name: str = "tensor", beside: Sequence[Tensor] = ()
) -> tuple[list[int], bool]:
    """How many rows every rank has, and whether any rank's tensor wants a gradient.

    A message that is not what the other side expects ends a process, or is read as other numbers, so ranks
    whose rows differ in shape or dtype are refused, on all of them alike; those without rows too. So are they
    where tensors that go ``beside`` it differ in number, in their rows' size or in dtype.
    """
    wants = torch.is_grad_enabled() and tensor.requires_grad
    others = [(_width(one), dtype_number(one.dtype)) for one in beside]
    mark, shape = _mark(number for other in others for number in other), tensor.shape[1:]
    head = [len(tensor), int(wants), _width(tensor), dtype_number(tensor.dtype), mark, _mark(shape)]
    gathered = torch.cat(_equal(torch.tensor(head, device=tensor.device), group)).view(-1, len(head))
    rows, wanted, widths, dtypes, marks, shapes = gathered.T.tolist()
    check_alike(name, "rows of one size on all ranks", widths, " elements")
    check_alike(name, "one dtype on all ranks", [dtype_of(number) for number in dtypes])
    if len(set(shapes)) > 1:  # as many numbers in another order
        raise ValueError(
            f"{name}: expected rows of one shape on all ranks, got {tuple(shape)} here,"
            f" else on ranks {_differing(shapes, group)}"
        )
    if len(set(marks)) > 1:
        own = ", ".join(f"{width} × {dtype_of(number)}" for width, number in others)
        raise ValueError(
            f"{name}: expected as much known of a row on all ranks (levels, words of tags, an auxiliary"
            f" vector's numbers, dtypes) and the same asked of it, got {own} here, else on ranks"
            f" {_differing(marks, group)}"
        )
    return rows, any(wanted)


def _differing(told: Sequence[int], group: Group) -> list[int]:
    """The ranks that told another number than this one."""
    return [number for number, other in enumerate(told) if other != told[rank(group)]]


def _mark(numbers: Iterable[int]) -> int:
    """One number for several, however many: the message has one length on all ranks."""
    mark = 0
    for number in numbers:
        mark = (1000003 * mark + number + 1) % (1 << 61)
    return mark


def _width(tensor: Tensor) -> int:
    """How many numbers a row has."""
    return math.prod(tensor.shape[1:])


# In one order on all ranks, which run the same PyTorch.
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def dtype_number(dtype: torch.dtype) -> int:
    """A number that tells a dtype to other ranks."""
    return _DTYPES.index(dtype)


def dtype_of(number: int) -> torch.dtype:
    """The dtype that another rank told of."""
    return _DTYPES[number]


def check_alike(name: str, expected: str, told: Sequence[object], unit: str = "") -> None:
    """Refuse, on every rank, what ranks told differently; all of them have been told it."""
    if len(set(told)) > 1:
        raise ValueError(f"{name}: expected {expected}, got [{', '.join(map(str, told))}]{unit}")


def largest_over_ranks(values: Tensor, group: Group = None) -> Tensor:
    """The largest of all ranks' numbers ``[K]``, each; its gradient comes back to the rank that has it."""
    return values if alone(group) else gather(values[None], group).amax(0)


def first_row(tensor: Tensor, group: Group = None, name: str = "tensor") -> int:
    """The number that this rank's first row has among the rows of all ranks.

    Args:
        tensor: this rank's rows ``[N, ...]``.
        group: the process group; by default all processes.
        name: what errors call ``tensor``.

    Raises:
        TypeError: ``tensor`` is not a tensor.
        ValueError: it has no rows (0-dim), or the ranks disagree about a row's shape or dtype.
    """
    _check_rows(tensor, name)
    if alone(group):
        return 0
    return sum(rows_of_ranks(tensor.detach(), group, name)[0][: rank(group)])


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
    parts = [part[:length] for part, length in zip(_equal(padded, group), rows, strict=True)]
    with no_autocast(tensor):  # under which cat refuses the half precision that is not autocast's own
        return torch.cat(parts)


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
