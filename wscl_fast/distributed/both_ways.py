"""Both directions of one similarity matrix on a ring: every pair of an x and a y of any ranks meets once.

A rank keeps its x. Blocks of y go round, each with what its rows gathered over the x of ranks it came by:
the statistics of log-sum-exps, the sum of logits and the number of positives. So one trip and one
product of x and y serve both directions. On the second trip a block brings the gradients from above of its
rows, and comes home with those of its vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from wscl_fast._ops import Block, merge_blocks
from wscl_fast.distributed.collectives import Group, agree, rows_of_ranks
from wscl_fast.distributed.ring import NO_SECOND, round_trip, wanted_by_any
from wscl_fast.functional import _block as blocks
from wscl_fast.functional._inputs import no_autocast
from wscl_fast.matching import add_gradients, matching_count, matching_logits
from wscl_fast.pairs import Meets, Pairs
from wscl_fast.values import Unchanged

__all__ = ["Direction", "both_ways"]


class Direction(NamedTuple):
    """What the rows of one side have over the other side's rows of all ranks."""

    lse: Tensor  # [N] over all that they meet
    own_kind: Tensor | None  # [N] over those of their own id, where it was asked for
    logits: Tensor  # [N], the sum of the logits of their own id
    positives: Tensor  # [N] int64, how many these are


def both_ways(pairs: Pairs, inner: bool, *, fused: bool, group: Group) -> tuple[Direction, Direction]:
    """Of this rank's queries, and of this rank's keys; no one has an own key, and the scale is folded in.

    With ``inner`` the log-sum-exps over the own ids as well. Every rank must ask the same, and go through the
    backward pass if one does.
    """
    x, y = pairs.queries, pairs.keys
    rows, _ = rows_of_ranks(y, group, "y", [x])  # gradients travel in the dtype of x
    if wanted_by_any(group, x, y):
        x, y = agree(x), agree(y)
    kinds: tuple[Meets, ...] = ("all", "same") if inner else ("all",)
    asked = _Asked(pairs.query_ids, pairs.key_ids, pairs.ignore_index, kinds, fused, rows, group)
    *values, x_count, y_count = _Both.apply(x, y, asked)  # type: ignore[no-untyped-call]
    sides = []
    for value, count in ((values[0], x_count), (values[1], y_count)):
        lse, *own_kind, logits = value
        sides.append(Direction(lse, own_kind[0] if inner else None, logits, count))
    return sides[0], sides[1]


class _Asked(NamedTuple):
    x_ids: Tensor
    y_ids: Tensor
    ignore_index: int
    kinds: tuple[Meets, ...]
    fused: bool
    rows: list[int]  # of y, of every rank
    group: Group

    def pairs(self, x: Tensor, y: Tensor, y_ids: Tensor) -> Pairs:
        """A block of y beside x."""
        one = x.new_ones(())
        return Pairs(x, y.to(x.dtype), self.x_ids, y_ids, None, one, self.ignore_index)

    def gathered(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the rows of both sides have over each other, ``[N, 2 kinds + 2]`` double precision: shift and
        sum of each log-sum-exp, the logits' sum, the count.
        """
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for kind in self.kinds:
            for side, stats in zip(sides, blocks.two_way(pairs, kind, self.fused), strict=True):
                side.append(stats)
        for side, direction in zip(sides, (pairs, pairs.swapped()), strict=True):
            positives = matching_logits(direction), matching_count(direction)
            side.append(torch.stack([value.double() for value in positives]))
        return torch.cat(sides[0]).T, torch.cat(sides[1]).T

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The same over the rows of two blocks."""
        parts = []
        for kind in range(len(self.kinds)):
            place = slice(2 * kind, 2 * kind + 2)
            none = a.new_empty(0, 0)
            parts.append(merge_blocks(Block(a[:, place].T, none), Block(b[:, place].T, none)).stats.T)
        return torch.cat([*parts, a[:, -2:] + b[:, -2:]], 1)


class _Both(torch.autograd.Function):
    """``[kinds + 1, N]`` and ``[kinds + 1, M]``: log-sum-exps and sums of logits; and the counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, asked: _Asked) -> tuple[Tensor, ...]:
        of_x: list[Tensor] = []

        def visit(travelling: list[Tensor], _: int) -> Tensor:
            mine, of_block = asked.gathered(asked.pairs(x, *travelling))
            of_x[:] = [mine if not of_x else asked.joined(of_x[0], mine)]
            return of_block

        of_y = round_trip([y, asked.y_ids], asked.rows, asked.group, visit, asked.joined)
        assert of_y is not None
        ctx.save_for_backward(x, y, of_x[0], of_y)
        ctx.asked, ctx.unchanged = asked, Unchanged(asked.x_ids, asked.y_ids)
        values, counts = [], []
        for side in (of_x[0], of_y):
            lses = [Block(stats, stats).lse() for stats in torch.split(side.T[:-2], 2)]
            values.append(torch.stack([*lses, side[:, -2]]).to(x.dtype))
            counts.append(side[:, -1].long())
        ctx.mark_non_differentiable(*counts)
        return *values, *counts

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.unchanged.check()
        grads = _BothBack.apply(ctx.asked, of_x, of_y, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return *grads, None


class _BothBack(torch.autograd.Function):
    """The trip of the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        asked: _Asked,
        grad_of_x: Tensor,  # [kinds + 1, N]
        grad_of_y: Tensor,
        x: Tensor,
        y: Tensor,
        of_x: Tensor,  # [N, 2 kinds + 2], over all ranks
        of_y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        grad_x = torch.zeros_like(x)
        kinds = len(asked.kinds)

        def visit(travelling: list[Tensor], _: int) -> Tensor:
            block, ids, stats, from_above = travelling
            pairs = asked.pairs(x, block, ids)
            grad_block = torch.zeros_like(pairs.keys)
            for number, kind in enumerate(asked.kinds):
                sides: list[tuple[Tensor, Tensor]] = []
                for side, grad in ((of_x, grad_of_x.T), (stats, from_above)):
                    here = side[:, 2 * number : 2 * number + 2].T.contiguous()
                    # Whatever comes from above for a row that meets nothing goes nowhere.
                    sides.append((here, torch.where(here[1] == 0, 0.0, grad[:, number]).contiguous()))
                to_x, to_block = blocks.two_way_backward(pairs, kind, sides[0], sides[1], asked.fused)
                grad_x.add_(to_x)
                grad_block.add_(to_block)
            add_gradients(pairs, grad_of_x[kinds], grad_x, grad_block)
            add_gradients(pairs.swapped(), from_above[:, kinds], grad_block, grad_x)
            return grad_block

        with no_autocast(x):
            luggage = [y, asked.y_ids, of_y, grad_of_y.T.contiguous()]
            grad_y = round_trip(luggage, asked.rows, asked.group, visit)
        assert grad_y is not None
        return grad_x, grad_y.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(NO_SECOND)
