"""One request over blocks of keys: joined block by block, and its gradient block by block.

With ``v_b`` a request's value over block b and v the joined one, whose upstream gradient is g:

    sum        v = Σ v_b              ∂/∂v_b = g
    logsumexp  v = log Σ e^{v_b}      ∂/∂v_b = g e^{v_b − v}
    largest    v = max v_b            ∂/∂v_b = g where v_b = v, shared by the blocks where it is

What is cheap to keep for the queries' gradient (the mean key of a softmax, the sum of a cluster's keys) is
kept; any other request is computed again where the block comes by in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wscl_fast import _ops, chunked
from wscl_fast._ops import Block, merge_blocks
from wscl_fast.affinity import factors, has_factors
from wscl_fast.functional import _block as blocks
from wscl_fast.functional._requests import AffinitySum, LogitSum, LogSumExp, Request, Softmax, SoftplusSum
from wscl_fast.matching import Matching, chunks
from wscl_fast.scatter import add_rows
from wscl_fast.slices import slices

__all__ = ["Needs", "Term", "term_of"]

LEAST_QUERIES = 256  # rows at a time, for the products to be worth it


class Needs(NamedTuple):
    """Who wants a gradient."""

    queries: bool
    keys: bool


class Term:
    """A request that is computed again in the backward pass, if it has one."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.again = request.differentiable
        self.joined: Tensor | None = None  # over the blocks so far, double precision where not a count
        self.ties: Tensor | None = None  # in how many blocks the largest value lies
        self.grad_inputs: list[Tensor | None] = []

    def add(self, request: Request, needs: Needs, fused: bool) -> None:
        """The forward pass over a block, whose request this is."""
        with torch.no_grad():
            parts = [request.of_rows(rows).here(fused) for rows in _rows(request)]
        part = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        self.dtype = part.dtype
        part = part.double() if part.is_floating_point() else part
        if self.joined is None:
            self.joined, self.ties = part, torch.ones_like(part)
        elif request.joined == "sum":
            self.joined = self.joined + part
        elif request.joined == "logsumexp":
            self.joined = torch.logaddexp(self.joined, part)
        else:
            assert self.ties is not None
            self.ties = torch.where(
                part > self.joined, 1.0, self.ties + torch.where(part == self.joined, 1.0, 0.0)
            )
            self.joined = torch.maximum(self.joined, part)

    def value(self) -> Tensor:
        """The value over all blocks."""
        assert self.joined is not None
        # A copy: what is kept here does not hang on the graph that it is kept for.
        return self.joined.to(self.dtype, copy=True)

    def turn(self, grad: Tensor, request: Request, queries: Tensor, total: Tensor) -> None:
        """Before a backward pass: the gradient from above, and the queries' gradient ``total [N, d]``, which
        a term adds its own to.
        """
        self.grad, self.total = grad, total
        self.grad_inputs = [None] * len(request.inputs)

    def add_queries(self, total: Tensor) -> None:
        """After a backward pass: add what was not added block by block."""

    def back(self, request: Request, needs: Needs, gathered: Tensor | None, fused: bool) -> Tensor | None:
        """The backward pass over a block; its keys' gradient on top of what was gathered of it, if any."""
        if not request.differentiable:
            return gathered
        pairs = request.pairs
        leaves = {name: getattr(request, name).detach().requires_grad_() for name in request.inputs}
        keys = pairs.keys.detach().requires_grad_()
        for rows in _rows(request):
            queries = pairs.queries[rows].detach().requires_grad_()
            with torch.enable_grad():
                of_rows = replace(request, **leaves).of_rows(rows)
                of_rows = replace(of_rows, pairs=of_rows.pairs._replace(queries=queries, keys=keys))
                part = of_rows.here(fused)
            wanted = [queries, *leaves.values(), *([keys] if needs.keys else [])]
            share = self._share(part.detach(), rows)
            of_queries, *others = torch.autograd.grad(part, wanted, share, materialize_grads=True)
            self.total[rows] += of_queries
            for place in range(len(leaves)):
                known = self.grad_inputs[place]
                self.grad_inputs[place] = others[place] if known is None else known + others[place]
            if needs.keys:
                gathered = _plus(gathered, others[-1])
        return gathered

    def _share(self, part: Tensor, rows: slice) -> Tensor:
        """What of the gradient from above is this block's."""
        grad = self.grad[..., rows]
        if self.request.joined == "sum":
            return grad
        assert self.joined is not None
        joined = self.joined[..., rows]
        if self.request.joined == "largest":
            assert self.ties is not None
            return torch.where(part == joined, grad / self.ties[..., rows].to(part.dtype), 0.0)
        finite = joined.masked_fill(joined == -torch.inf, 0)
        share = torch.where(part == -torch.inf, 0.0, grad) * (part - finite).exp()
        return share.to(part.dtype)


class _OfSoftmax(Term):
    """A log-sum-exp: with its shift, its sum and the mean key every gradient is at hand."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.again = False
        self.block: Block | None = None

    def add(self, request: Request, needs: Needs, fused: bool) -> None:
        assert isinstance(request, LogSumExp)
        need_mean = needs.queries or isinstance(request, Softmax)
        here = blocks.logsumexp(request.scaled(), request.meets, need_mean, fused)
        self.block = here if self.block is None else merge_blocks(self.block, here)
        self.queries = request.pairs.queries

    def value(self) -> Tensor:
        assert self.block is not None
        assert isinstance(self.request, LogSumExp)
        lse = self.block.lse()
        if isinstance(self.request, Softmax):
            mean = self.request.scaled().scale * (self.queries * self.block.mean).sum(1)
            lse = torch.stack([lse, mean.double()])
        return lse.to(self.queries.dtype)

    def turn(self, grad: Tensor, request: Request, queries: Tensor, total: Tensor) -> None:
        assert self.block is not None
        assert isinstance(request, LogSumExp)
        grad = grad[0] if isinstance(request, Softmax) else grad
        self.grad = torch.where(self.block.stats[1] == 0, 0.0, grad)

    def add_queries(self, total: Tensor) -> None:
        assert self.block is not None
        assert isinstance(self.request, LogSumExp)
        if len(self.block.mean):
            total.addcmul_((self.request.scaled().scale * self.grad)[:, None], self.block.mean)

    def back(self, request: Request, needs: Needs, gathered: Tensor | None, fused: bool) -> Tensor | None:
        if not needs.keys:
            return None
        assert self.block is not None
        assert isinstance(request, LogSumExp)
        stats = self.block.stats
        grad = blocks.logsumexp_backward(request.scaled(), request.meets, stats, self.grad, fused)
        return _plus(gathered, grad)


class _OfLogits(Term):
    """A sum of logits over clusters: one sum for each cluster, in either direction."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.again = False
        pairs = request.pairs
        self.matching = Matching(pairs.query_ids, pairs.ignore_index)

    def add(self, request: Request, needs: Needs, fused: bool) -> None:
        self.matching.add(self.matching.placed(request.pairs), request.pairs.keys)
        self.queries = request.pairs.queries

    def value(self) -> Tensor:
        products = [(self.queries[rows] * self.matching.sum(rows)).sum(1) for rows in chunks(self.queries)]
        total = torch.cat(products) if products else self.queries.new_zeros(0)
        return (self.request.pairs.scale * total).to(self.queries.dtype)

    def turn(self, grad: Tensor, request: Request, queries: Tensor, total: Tensor) -> None:
        self.upstream, self.queries = request.pairs.scale * grad, queries
        self.per_id = self.matching.per_id(queries, self.upstream).to(queries.dtype)

    def add_queries(self, total: Tensor) -> None:
        for rows in chunks(total):
            total[rows] += self.upstream[rows, None] * self.matching.sum(rows).to(total.dtype)

    def back(self, request: Request, needs: Needs, gathered: Tensor | None, fused: bool) -> Tensor | None:
        if not needs.keys:
            return None
        gathered = torch.zeros_like(request.pairs.keys) if gathered is None else gathered
        self.matching.spread(
            gathered, self.matching.placed(request.pairs), self.queries, self.per_id, self.upstream
        )
        return gathered


class _OfFactors(Term):
    """A sum weighed by products of two factors, W = A Bᵀ: one sum for each factor, in either direction.

        Σ_j w_ij S_ij = s ⟨q_i, A_i BᵀK⟩      ∂/∂q_i = s g_i A_i BᵀK      ∂/∂K = B Aᵀ(s g ∘ Q)

    What a query's own key adds is taken off where its block comes by.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.again = request.pairs.own is not None
        self.sums: Tensor | None = None

    def add(self, request: Request, needs: Needs, fused: bool) -> None:
        assert isinstance(request, AffinitySum)
        self.queries = request.pairs.queries
        there, touched = request.there()
        sums = chunked.factor_sums(request.affinity, request.key_auxiliary, request.pairs.keys, there)
        if self.sums is None:
            self.sums = torch.zeros_like(sums)
            # Of own keys: the sum of w S / s, and of w.
            self.own = sums.new_zeros(2, len(self.queries))
            self.touched = torch.zeros_like(self.own[0], dtype=torch.bool)
        self.sums += sums
        if touched is not None:
            self.touched |= touched
        for rows, _, weight, own_keys in self._own(request, there):
            self.own[0, rows] += weight * (self.queries[rows].to(weight.dtype) * own_keys).sum(1)
            self.own[1, rows] += weight

    def value(self) -> Tensor:
        assert self.sums is not None
        logits, total = torch.empty_like(self.own)
        for rows in chunks(self.queries, len(self.sums)):
            pulled = self._factors(rows) @ self.sums
            logits[rows] = (self.queries[rows] * pulled[:, :-1]).sum(1)
            total[rows] = pulled[:, -1]
        logits = self.request.pairs.scale * (logits - self.own[0])
        return torch.stack([logits.masked_fill(self.touched, torch.nan), total - self.own[1], self.own[1]])

    def turn(self, grad: Tensor, request: Request, queries: Tensor, total: Tensor) -> None:
        assert isinstance(request, AffinitySum)
        self.queries, self.total = queries, total
        self.upstream = (request.pairs.scale * grad[0]).masked_fill(self.touched, 0)
        self.per_factor: Tensor | None = None

    def add_queries(self, total: Tensor) -> None:
        assert self.sums is not None
        for rows in chunks(total, len(self.sums)):
            pulled = self._factors(rows) @ self.sums[:, :-1]
            total[rows] += (self.upstream[rows, None] * pulled).to(total.dtype)

    def back(self, request: Request, needs: Needs, gathered: Tensor | None, fused: bool) -> Tensor | None:
        assert isinstance(request, AffinitySum)
        there, _ = request.there()
        keys, auxiliary = request.pairs.keys, request.key_auxiliary
        assert self.sums is not None
        if needs.keys:
            gathered = torch.zeros_like(keys) if gathered is None else gathered
            per_factor = self._per_factor()
            for rows in chunks(keys, len(self.sums)):
                grad = factors(request.affinity, auxiliary[rows], per_factor.dtype) @ per_factor
                if there is not None:
                    grad.masked_fill_(~there[rows, 1:], 0)
                gathered[rows] += grad.to(keys.dtype)
        for rows, place, weight, own_keys in self._own(request, there):
            share = -(self.upstream[rows] * weight)[:, None]
            self.total[rows] += (share * own_keys).to(self.total.dtype)
            if gathered is not None:
                met = weight != 0 if there is None else (weight != 0) & there[place, 1]
                mine = torch.where(met[:, None], share * self.queries[rows], 0.0)
                add_rows(gathered, place, mine.to(keys.dtype))
        return gathered

    def _per_factor(self) -> Tensor:
        """Aᵀ(s g ∘ Q), made with the first block whose keys want a gradient."""
        if self.per_factor is None:
            assert self.sums is not None
            self.per_factor = torch.zeros_like(self.sums[:, :-1])
            for rows in chunks(self.queries, len(self.sums)):
                self.per_factor += self._factors(rows).T @ (self.upstream[rows, None] * self.queries[rows])
        return self.per_factor

    def _own(
        self, request: AffinitySum, there: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Some queries at a time, and their own keys as the request has them."""
        assert self.sums is not None
        if request.pairs.own is not None and len(request.pairs.keys):
            for rows in chunks(self.queries, len(self.sums)):
                yield rows, *request.own_share(there, self.sums.dtype, rows)

    def _factors(self, rows: slice) -> Tensor:
        """Of some queries."""
        assert isinstance(self.request, AffinitySum)
        return factors(self.request.affinity, self.request.query_auxiliary[rows], self.own.dtype)


class _OfSoftplus(Term):
    """A sum of softplus by the kernels, with its slope and the sum of keys weighed by it."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.again = False
        self.block: _ops.SoftplusBlock | None = None

    def add(self, request: Request, needs: Needs, fused: bool) -> None:
        assert isinstance(request, SoftplusSum)
        here = _ops.softplus_block(request.pairs, request.offset, request.meets, need_direction=needs.queries)
        self.dtype = here.direction.dtype
        self.block = here if self.block is None else self.block.plus(here)

    def value(self) -> Tensor:
        assert self.block is not None
        return self.block.total.to(self.dtype, copy=True)

    def turn(self, grad: Tensor, request: Request, queries: Tensor, total: Tensor) -> None:
        assert self.block is not None
        self.grad = grad
        self.grad_inputs = [grad * self.block.slope.to(grad.dtype)]

    def add_queries(self, total: Tensor) -> None:
        assert self.block is not None
        if len(self.block.direction):
            total.addcmul_((self.request.pairs.scale * self.grad)[:, None], self.block.direction)

    def back(self, request: Request, needs: Needs, gathered: Tensor | None, fused: bool) -> Tensor | None:
        if not needs.keys:
            return None
        assert isinstance(request, SoftplusSum)
        grad = _ops.softplus_block_backward(self.grad, request.pairs, request.offset, request.meets)
        return _plus(gathered, grad)


def _rows(request: Request) -> Iterator[slice]:
    """The queries, so many at a time that what is made of their vectors stays small."""
    n, width = request.pairs.queries.shape
    most = max(n, 1) * max(width, 1) if request.most is None else request.most
    step = max(most // max(width, 1), LEAST_QUERIES)
    return slices(n, step)


def _plus(gathered: Tensor | None, grad: Tensor) -> Tensor:
    return grad if gathered is None else gathered.add_(grad)


def term_of(request: Request, fused: bool) -> Term:
    """The way to join a request."""
    if isinstance(request, LogSumExp):
        return _OfSoftmax(request)
    if isinstance(request, LogitSum):
        return _OfLogits(request)
    if isinstance(request, AffinitySum) and has_factors(request.affinity):
        return _OfFactors(request)
    return _OfSoftplus(request) if fused and isinstance(request, SoftplusSum) else Term(request)
