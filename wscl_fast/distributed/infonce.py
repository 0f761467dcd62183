"""Clustered InfoNCE over the batch of all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from wscl_fast.distributed.collectives import Group
from wscl_fast.distributed.collectives import gather as gather_rows
from wscl_fast.distributed.shared import Gather, Shared
from wscl_fast.functional import Denominator, Impl, Positives, Reduction
from wscl_fast.functional._checks import check_bool
from wscl_fast.functional._inputs import Batch
from wscl_fast.functional._variant import Variant
from wscl_fast.functional.infonce import infonce_rows
from wscl_fast.functional.statistics import summarise

__all__ = ["clustered_infonce"]


def clustered_infonce(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    positives: Positives = "out",
    denominator: Denominator = "all",
    hardness: float = 0.0,
    prior: float = 0.0,
    query_samples: Tensor | None = None,
    key_samples: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -1,
    exclude_self: bool | Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    return_stats: bool = False,
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
) -> Any:
    """:func:`wscl_fast.functional.clustered_infonce` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        clustered_infonce(torch.cat(queries), torch.cat(keys), query_clusters=torch.cat(query_clusters), ...)

    Every rank gives its own rows and gets the same number: the loss of the whole batch, averaged over the
    anchors of *all* ranks. Its backward pass gives every rank the exact gradient of that number with respect
    to the rank's own tensors, what other ranks' queries ask of its keys included. Ranks may have different
    numbers of rows, none included (an empty tensor of the others' dtype and width); all must run forward and
    backward, with the same settings.

    What that means for parameters: each rank has the share of the gradient that came through its own rows,
    and the *sum* over the ranks is the gradient of one process. DistributedDataParallel takes the *mean*:
    pass ``ddp=True``, which multiplies the gradient (not the loss) by the number of ranks. The same holds
    for a temperature that is a parameter: have it inside a module that DistributedDataParallel wraps.

    Args:
        queries: ``[N, d]``, this rank's.
        keys: ``[M, d]``, this rank's. Without keys all ranks' queries are contrasted with each other.
        query_clusters: ``[N]`` int64, this rank's.
        key_clusters: ``[M]`` int64, this rank's; by default ``query_clusters``.
        temperature: as for one process; alike on all ranks, or ``[N]``, this rank's.
        positives: as for one process.
        denominator: as for one process.
        hardness: as for one process.
        prior: as for one process.
        query_samples: ``[N]`` int64, this rank's. Sample ids must differ between ranks as samples do.
        key_samples: ``[M]`` int64, this rank's; by default ``query_samples``.
        weights: ``[N]``, this rank's.
        ignore_index: as for one process.
        exclude_self: by default true where ``keys`` is not given. True: query i never meets key i of its own
            rank. A tensor ``[N]`` int64 gives each query's own key by its number among all ranks' keys in
            rank order (``gather="count"``: among this rank's), −1 for none.
        reduction: ``"mean"`` and ``"sum"`` over the anchors of all ranks; ``"none"`` gives this rank's rows.
        impl: as for one process; with ``"reference"`` a ring gathers all keys too.
        return_stats: return ``(loss, stats)``: :class:`wscl_fast.functional.InfoNCEStats` of the batch of all
            ranks, with this rank's rows where they are told apart.
        gather: how keys meet the other ranks' queries. ``"all"``: each rank gets all keys. ``"ring"``: keys
            travel from rank to rank while each computes, and no rank ever holds more than two blocks of
            them; with ``denominator="other"`` they go round twice. A ring has no second derivative.
            ``"count"``: keys stay, each rank's are all that its queries meet (a queue that every rank holds
            whole); only the anchors are counted over all ranks.
        group: the process group; by default all processes.
        ddp: whether the gradients will be averaged over the ranks, as DistributedDataParallel does.

    Returns:
        0-dim tensor, the same on every rank; ``[N]`` for ``reduction="none"``; with ``return_stats`` the
        statistics as well.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
        ValueError: on all ranks, where their rows differ in dtype or size.
    """
    shared = Shared(gather, group, ddp, reduction, impl)
    check_bool("return_stats", return_stats)
    variant = Variant(positives, denominator, hardness, prior)
    batch = Batch(queries, keys, query_clusters, key_clusters, temperature, ignore_index, exclude_self)
    batch, (key_samples,) = shared.meet(
        batch, key_samples=query_samples if key_samples is None else key_samples
    )
    rows = infonce_rows(
        batch,
        variant,
        query_samples,
        key_samples,
        impl=impl,
        need_stats=return_stats,
        reduction="sum" if weights is None and reduction != "none" else "none",
        passes=shared.passes,
    )
    loss = shared.reduce(rows.loss, rows.positives, weights)
    if rows.stats is None:
        return loss
    return loss, summarise(rows.stats, rows.positives, rows.scale, partial(gather_rows, group=group))
