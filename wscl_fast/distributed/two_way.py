"""SigLIP's loss over the pairs of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from wscl_fast.distributed.collectives import Group, first_row
from wscl_fast.distributed.shared import Gather, Shared
from wscl_fast.functional import Impl, Reduction
from wscl_fast.functional._checks import check_matrix
from wscl_fast.functional._inputs import Batch
from wscl_fast.functional.two_way import siglip_rows

__all__ = ["ids_of_rows", "siglip_loss"]


def ids_of_rows(x: Tensor, group: Group) -> Tensor:
    """Ids that tell this rank's rows from each other and from those of all other ranks."""
    check_matrix("x", x)
    return torch.arange(len(x), device=x.device) + first_row(x, group)


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
    gather: Gather = "all",
    group: Group = None,
    ddp: bool = False,
) -> Tensor:
    """:func:`wscl_fast.functional.siglip_loss` of one process that has the batch of all ranks.

    In plain PyTorch, where the ranks' tensors lie in one process::

        siglip_loss(torch.cat(x), torch.cat(y), x_clusters=torch.cat(x_clusters), ...)

    Every rank gives its own rows of both sides; the number and the gradient that it gets, and ``gather`` (of
    the rows of ``y``), ``group`` and ``ddp``, are as in :func:`wscl_fast.distributed.clustered_infonce`.
    Without ids row i of a rank belongs to row i of the same rank. The bias, and a temperature that is not
    ``[N]``, are alike on all ranks.

    Returns:
        0-dim tensor, the same on every rank; ``[N]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as for one process. An error on one rank alone leaves the others waiting.
    """
    shared = Shared(gather, group, ddp, reduction, impl)
    if x_clusters is None:
        if y_clusters is not None:
            raise ValueError("y_clusters: expected None where x_clusters is None, got a tensor")
        x_clusters = ids_of_rows(x, group)
    batch, _ = shared.meet(Batch(x, y, x_clusters, y_clusters, temperature, ignore_index))
    loss, has_id = siglip_rows(batch, bias, impl=impl, passes=shared.passes)
    return shared.reduce(loss, has_id, weights)
