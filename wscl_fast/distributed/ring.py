"""Keys streamed round the ranks, so that none of them ever holds all keys.

Every rank keeps its queries. Its block of keys goes from rank to rank; at each of the W stops it meets the
queries there, while the next block is already on its way. After one trip every rank has, over all keys, the
log-sum-exp of its queries and their mean keys, from which the queries' gradient is read off. The gradient
of the keys takes a second trip: each block travels with the gradient gathered so far and comes home with
all of it.

On a rank, in memory: two blocks of keys, and as many of their gradients in the backward pass. On the wire:
M · d numbers a rank in the forward pass, as an all-gather sends, and twice that in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from wscl_fast._ops import merge_blocks
from wscl_fast.distributed import blocks
from wscl_fast.distributed.collectives import Group, agree, peer, rank, rows_of_ranks, world_size
from wscl_fast.distributed.matching import Matching
from wscl_fast.pairs import Pairs

__all__ = ["clustered_infonce"]


def clustered_infonce(
    queries: Tensor,  # [N, d], this rank's
    keys: Tensor,  # [M of this rank, d]
    query_ids: Tensor,  # [N] int64
    key_ids: Tensor,  # [M of this rank] int64
    own: Tensor | None,  # [N] int64, the number among all ranks' keys
    scale: Tensor,  # 0-dim
    *,
    inner: bool,
    ignore_index: int,
    fused: bool,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` of this rank's queries over all ranks' keys, and the counts of their positives ``[N]``."""
    rows, wanted = rows_of_ranks(keys, group)
    task = _Task(query_ids, key_ids, own, inner, ignore_index, fused, tuple(rows), group)
    keys = agree(keys) if wanted else keys.detach()
    return cast("tuple[Tensor, Tensor]", _Ring.apply(queries, keys, scale, task))  # type: ignore[no-untyped-call]


class _Task(NamedTuple):
    """What both passes read beside the tensors that get gradients."""

    query_ids: Tensor
    key_ids: Tensor
    own: Tensor | None
    inner: bool
    ignore_index: int
    fused: bool
    rows: tuple[int, ...]  # keys of every rank
    group: Group

    def pairs(self, queries: Tensor, keys: Tensor, scale: Tensor, ids: Tensor, block: int) -> Pairs:
        """The queries here and a block of keys; an own key that lies in another block is none."""
        own = None if self.own is None else self.own - sum(self.rows[:block])
        own = None if own is None else torch.where((own >= 0) & (own < len(keys)), own, -1)
        return Pairs(queries, keys.to(queries.dtype), self.query_ids, ids, own, scale, self.ignore_index)


class _Traffic:
    """Sends to the next rank and receives from the one before, while this one computes."""

    def __init__(self, group: Group) -> None:
        me, size = rank(group), world_size(group)
        self.group, self.calls = group, 0
        self.after, self.before = (peer((me + step) % size, group) for step in (1, -1))
        self.operations: list[dist.P2POp] = []
        self.requests: list[dist.Work] = []

    def pass_on(self, tensor: Tensor, rows: int) -> Tensor:
        """Line a tensor up for the next rank; returns the room for what comes in its place, ``rows`` long."""
        room = tensor.new_empty(rows, *tensor.shape[1:])
        if tensor.numel():
            send = dist.P2POp(dist.isend, tensor.contiguous(), self.after, self.group, self.calls)
            self.operations.append(send)
        if room.numel():
            self.operations.append(dist.P2POp(dist.irecv, room, self.before, self.group, self.calls))
        self.calls += 1
        return room

    def start(self) -> None:
        self.requests = dist.batch_isend_irecv(self.operations) if self.operations else []

    def wait(self) -> None:
        for request in self.requests:
            request.wait()
        self.operations, self.requests = [], []  # what was sent may be freed


# What happens where a block meets this rank's queries: given the block's rank, keys and ids, the gradient of
# its keys, or None.
_Visit = Callable[[int, Tensor, Tensor], "Tensor | None"]


def _trip(keys: Tensor, task: _Task, visit: _Visit) -> Tensor | None:
    """Sends every rank's keys once round; the gradient of this rank's block comes home with all in it."""
    me, size, ids = rank(task.group), world_size(task.group), task.key_ids
    gathered: Tensor | None = None  # the gradient of the block that was here before
    for step in range(size):
        block = (me - step) % size
        traffic = _Traffic(task.group)
        following, came = None, None
        if step + 1 < size:
            following = [traffic.pass_on(tensor, task.rows[block - 1]) for tensor in (keys, ids)]
        if gathered is not None:
            came = traffic.pass_on(gathered, task.rows[block])
        traffic.start()
        mine = visit(block, keys, ids)
        traffic.wait()
        gathered = mine if mine is None or came is None else mine.add_(came)
        if following is not None:
            keys, ids = following
    if gathered is None or size == 1:
        return gathered
    traffic = _Traffic(task.group)
    home = traffic.pass_on(gathered, task.rows[me])
    traffic.start()
    traffic.wait()
    return home


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        need_mean = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        met = positive = blocks.nothing(queries, need_mean)
        matching = Matching(task.query_ids, task.ignore_index, 0 if task.inner else queries.shape[1])

        def visit(block: int, keys: Tensor, ids: Tensor) -> None:
            nonlocal met, positive
            pairs = task.pairs(queries, keys, scale, ids, block)
            matching.add(pairs)
            met = merge_blocks(met, blocks.logsumexp(pairs, "all", need_mean, task.fused))
            if task.inner:
                positive = merge_blocks(positive, blocks.logsumexp(pairs, "same", need_mean, task.fused))

        _trip(keys, task, visit)
        count = matching.count()
        if task.inner:
            numerator, pulled = positive.lse() - count.clamp(min=1).double().log(), positive.mean
        else:
            mean = matching.mean()
            numerator, pulled = scale * (queries * mean).sum(1), mean.to(queries.dtype)
        loss = torch.where(count > 0, met.lse() - numerator, 0.0).to(queries.dtype)
        direction = torch.where((count > 0)[:, None], met.mean - pulled, 0.0) if need_mean else met.mean
        ctx.save_for_backward(queries, keys, scale, met.stats, positive.stats, direction, count)
        ctx.task = task
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, stats, positive_stats, direction, count = ctx.saved_tensors
        task: _Task = ctx.task
        grad_queries = grad_keys = grad_scale = None
        upstream = torch.where(count > 0, grad, 0.0)
        if ctx.needs_input_grad[0]:
            grad_queries = scale * upstream[:, None] * direction
        if ctx.needs_input_grad[2]:
            grad_scale = (upstream * (queries * direction).sum(1)).sum()
        if ctx.needs_input_grad[1]:
            matching = Matching(task.query_ids, task.ignore_index, 0)
            pulls = (scale * upstream / count.clamp(min=1))[:, None] * queries
            per_id = matching.per_id(pulls)

            def visit(block: int, keys: Tensor, ids: Tensor) -> Tensor:
                pairs = task.pairs(queries, keys, scale, ids, block)
                grad = blocks.logsumexp_backward(pairs, "all", stats, upstream, task.fused)
                if task.inner:
                    grad -= blocks.logsumexp_backward(pairs, "same", positive_stats, upstream, task.fused)
                else:
                    matching.subtract(grad, pairs, pulls, per_id)
                return grad

            home = _trip(keys, task, visit)
            grad_keys = None if home is None else home.to(keys.dtype)
        return grad_queries, grad_keys, grad_scale, None
