"""Clustered InfoNCE through the simulated CUDA core: one call runs the forward and the backward pass."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from simulator import (
    PRECISION,
    Device,
    InfoNCEBackward,
    InfoNCEForward,
    InfoNCEProblem,
    library,
)
from torch import Tensor


@dataclass
class Results:
    """What came out, and what the kernels reported."""

    loss: Tensor
    count: Tensor
    grad_queries: Tensor | None
    grad_keys: Tensor | None
    grad_scale: Tensor | None
    launches: list[dict[str, Any]]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    own: Tensor | None = None,
    *,
    scale: float = 10.0,
    exclude_self: bool = True,
    inner: bool = False,
    grad_loss: Tensor | None = None,
    need_keys: bool = True,
    fast: bool = False,
    arch: str = "90",
) -> Results:
    """Loss, counts and, where ``grad_loss`` is given, the gradients of queries, keys and scale."""
    lib = library(arch)
    n, d = queries.shape
    m = n if keys is None else len(keys)
    with Device() as device:
        q = device.put(queries, "queries")
        k = q if keys is None else device.put(keys, "keys")
        zq = device.put(query_clusters, "query_clusters")
        zk = zq if key_clusters is None else device.put(key_clusters, "key_clusters")
        scales = device.put(torch.tensor([scale], dtype=torch.float32), "scale")
        owns = None if own is None else device.put(own, "own")
        sorted_q, order_q = (device.put(x, "sorted queries") for x in torch.sort(zq, stable=True))
        sorted_k, order_k = (
            (sorted_q, order_q)
            if keys is None
            else (device.put(x, "sorted keys") for x in torch.sort(zk, stable=True))
        )
        problem = InfoNCEProblem(
            precision=PRECISION[queries.dtype] + (1 if fast else 0),
            queries=q.data_ptr(),
            query_stride=q.stride(0),
            n=n,
            self=keys is None,
            keys=k.data_ptr(),
            key_stride=k.stride(0),
            m=m,
            d=d,
            query_clusters=zq.data_ptr(),
            key_clusters=zk.data_ptr(),
            own=_address(owns),
            exclude_self=exclude_self and keys is None,
            inner=inner,
            ignore_index=-1,
            scale=scales.data_ptr(),
            sorted_queries=sorted_q.data_ptr(),
            query_order=order_q.data_ptr(),
            sorted_keys=sorted_k.data_ptr(),
            key_order=order_k.data_ptr(),
        )

        def call(function: Any, arguments: Any) -> None:
            for _ in range(2):  # the first call tells how much memory the second needs
                assert function(ctypes.byref(problem), ctypes.byref(arguments), None) == 0
                if not arguments.workspace:
                    space = device.empty(
                        max(arguments.workspace_bytes, 1), dtype=torch.uint8, name="workspace"
                    )
                    arguments.workspace = space.data_ptr()

        loss, count = device.empty(n), device.empty(n, dtype=torch.int64)
        stats = device.empty(4 if inner else 2, n, dtype=torch.float64, name="stats")
        with_direction = keys is not None and grad_loss is not None
        direction = device.empty(n if with_direction else 0, d, name="direction")
        call(
            lib.wscl_infonce_forward,
            InfoNCEForward(
                loss=loss.data_ptr(),
                count=count.data_ptr(),
                stats=stats.data_ptr(),
                direction=direction.data_ptr() if with_direction else None,
                need_direction=with_direction,
            ),
        )
        grad_queries = grad_keys = grad_scale = None
        if grad_loss is not None:
            upstream = device.put(grad_loss, "grad_loss")
            grad_queries = device.empty(n, d, dtype=queries.dtype, name="grad_queries")
            grad_keys = (
                device.empty(m, d, dtype=queries.dtype, name="grad_keys")
                if keys is not None and need_keys
                else None
            )
            grad_scale = device.empty(1, name="grad_scale")
            call(
                lib.wscl_infonce_backward,
                InfoNCEBackward(
                    grad_loss=upstream.data_ptr(),
                    count=count.data_ptr(),
                    stats=stats.data_ptr(),
                    direction=direction.data_ptr() if with_direction else None,
                    grad_queries=grad_queries.data_ptr(),
                    grad_keys=_address(grad_keys),
                    grad_scale=grad_scale.data_ptr(),
                    need_queries=True,
                    need_keys=grad_keys is not None,
                    need_scale=True,
                ),
            )
        launches = device.launches()
    return Results(loss, count, grad_queries, grad_keys, grad_scale, launches)
