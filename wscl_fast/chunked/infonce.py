"""Clustered InfoNCE in plain PyTorch with memory linear in N + M, for any device and any dtype.

The mathematics of the fused kernels, block by block: an online log-sum-exp over tiles of logits that
carries the softmax-weighted keys along, and a backward pass that recomputes the tiles. A tile is at
most ``ROWS × COLUMNS`` logits, so peak memory does not grow with N × M.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 1024
COLUMNS = 4096


class Labels(NamedTuple):
    """What decides which pairs count."""

    query_clusters: Tensor  # [N] int64
    key_clusters: Tensor  # [M] int64
    own: Tensor | None  # [N] int64, the key that a query must not meet, or −1
    ignore_index: int

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The masks ``allowed`` and ``positive`` of one tile."""
        keys = self.key_clusters[columns]
        allowed = (keys != self.ignore_index).expand(len(self.query_clusters[rows]), -1)
        if self.own is not None:
            index = torch.arange(columns.start, columns.stop, device=keys.device)
            allowed = allowed & (index != self.own[rows, None])
        return allowed, allowed & (self.query_clusters[rows, None] == keys)


class _Softmax:
    """Online log-sum-exp of rows of logits, carrying ``softmax @ values``."""

    def __init__(self, like: Tensor, rows: int, width: int) -> None:
        self.maximum = like.new_full((rows,), -torch.inf)
        self.total = like.new_zeros(rows)
        self.output = like.new_zeros(rows, width)

    def update(self, logits: Tensor, values: Tensor | None) -> None:
        maximum = torch.maximum(self.maximum, logits.amax(1))
        finite = torch.where(maximum == -torch.inf, 0.0, maximum)  # rows that met no key yet
        shrink = (self.maximum - finite).exp()
        weights = (logits - finite[:, None]).exp()
        self.total = self.total * shrink + weights.sum(1)
        if values is not None:
            self.output = self.output * shrink[:, None] + weights @ values
        self.maximum = maximum

    def log_sum_exp(self) -> Tensor:
        return self.maximum + self.total.log()

    def mean(self) -> Tensor:
        return self.output / self.total[:, None].clamp(min=torch.finfo(self.total.dtype).tiny)


def _blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _forward(
    queries: Tensor, keys: Tensor, scale: Tensor, labels: Labels, inner: bool, need_direction: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-row loss, positives' count, LSE over allowed and over positive keys, and ∂loss/∂(scale · q)."""
    parts: list[tuple[Tensor, ...]] = []
    width = keys.shape[1] if need_direction else 0
    for rows in _blocks(len(queries), ROWS):
        q = queries[rows]
        count = labels.query_clusters.new_zeros(len(q))
        everything, matching = _Softmax(queries, len(q), width), _Softmax(queries, len(q), width)
        mean_logit, mean_key = queries.new_zeros(len(q)), queries.new_zeros(len(q), width)
        for columns in _blocks(len(keys), COLUMNS):
            k = keys[columns]
            allowed, positive = labels.tile(rows, columns)
            values = k if need_direction else None
            logits = scale * (q @ k.T)
            count = count + positive.sum(1)
            everything.update(logits.masked_fill(~allowed, -torch.inf), values)
            if inner:
                matching.update(logits.masked_fill(~positive, -torch.inf), values)
            else:
                mean_logit = mean_logit + logits.masked_fill(~positive, 0).sum(1)
                if need_direction:
                    mean_key = mean_key + positive.to(k.dtype) @ k
        valid = count > 0
        share = 1 / count.clamp(min=1).to(q.dtype)
        lse, positive_lse = everything.log_sum_exp(), matching.log_sum_exp()
        numerator = positive_lse + share.log() if inner else mean_logit * share
        loss = torch.where(valid, lse - numerator, 0.0)
        if need_direction:
            pulled = matching.mean() if inner else mean_key * share[:, None]
            direction = torch.where(valid[:, None], everything.mean() - pulled, 0.0)
        else:
            direction = mean_key
        parts.append((loss, count, lse, positive_lse, direction))
    if not parts:
        empty = queries.new_zeros(0)
        return empty, labels.query_clusters.new_zeros(0), empty, empty, queries.new_zeros(0, width)
    loss, count, lse, positive_lse, direction = (torch.cat(column) for column in zip(*parts, strict=True))
    return loss, count, lse, positive_lse, direction


def _key_gradient(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    labels: Labels,
    inner: bool,
    count: Tensor,
    lse: Tensor,
    positive_lse: Tensor,
) -> Tensor:
    """∂loss/∂keys: the tiles are computed again, one block of keys after another."""
    grad_keys = torch.zeros_like(keys)
    valid = count > 0
    push = torch.where(valid, grad, 0.0)
    share = push / count.clamp(min=1).to(push.dtype)
    for columns in _blocks(len(keys), COLUMNS):
        k = keys[columns]
        for rows in _blocks(len(queries), ROWS):
            q = queries[rows]
            allowed, positive = labels.tile(rows, columns)
            met = valid[rows, None]
            logits = scale * (q @ k.T)
            weights = (
                push[rows, None] * (logits - lse[rows, None]).masked_fill(~(allowed & met), -torch.inf).exp()
            )
            if inner:
                pull = (logits - positive_lse[rows, None]).masked_fill(~(positive & met), -torch.inf).exp()
                weights = weights - push[rows, None] * pull
            else:
                weights = weights - share[rows, None] * positive.to(weights.dtype)
            grad_keys[columns] += scale * (weights.T @ q)
    return grad_keys


class _ClusteredInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        query_clusters: Tensor,
        key_clusters: Tensor,
        own: Tensor | None,
        inner: bool,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        labels = Labels(query_clusters, key_clusters, own, ignore_index)
        need_direction = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        loss, count, lse, positive_lse, direction = _forward(
            queries, keys, scale, labels, inner, need_direction
        )
        ctx.save_for_backward(
            queries, keys, scale, query_clusters, key_clusters, own, count, lse, positive_lse, direction
        )
        ctx.inner, ctx.ignore_index = inner, ignore_index
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, query_clusters, key_clusters, own, count, lse, positive_lse, direction = (
            ctx.saved_tensors
        )
        labels = Labels(query_clusters, key_clusters, own, ctx.ignore_index)
        grad_queries = grad_keys = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_queries = (scale * grad)[:, None] * direction
        if ctx.needs_input_grad[1]:
            grad_keys = _key_gradient(grad, queries, keys, scale, labels, ctx.inner, count, lse, positive_lse)
        if ctx.needs_input_grad[2]:
            grad_scale = (grad * (queries * direction).sum(1)).sum()
        return grad_queries, grad_keys, grad_scale, None, None, None, None, None


def clustered_infonce(
    queries: Tensor,  # [N, d]
    keys: Tensor,  # [M, d]
    query_clusters: Tensor,  # [N] int64
    key_clusters: Tensor,  # [M] int64
    own: Tensor | None,  # [N] int64
    scale: Tensor,  # 0-dim, 1 / temperature
    *,
    inner: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Clustered InfoNCE of every row in memory linear in N + M, as :mod:`wscl_fast.reference` defines it."""
    # Dynamo does not trace a Function that is given one tensor twice; a view of it is another tensor.
    keys, key_clusters = keys.view_as(keys), key_clusters.view_as(key_clusters)
    loss, count = _ClusteredInfoNCE.apply(  # type: ignore[no-untyped-call]
        queries, keys, scale.to(queries.dtype), query_clusters, key_clusters, own, inner, ignore_index
    )
    return loss, count
