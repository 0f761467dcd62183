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
    InfoNCEReduced,
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


def _problem(
    device: Device,
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None,
    own: Tensor | None,
    *,
    exclude_self: bool,
    inner: bool,
) -> InfoNCEProblem:
    """But for the scale and for the ids in order."""
    q = device.put(queries, "queries")
    k = q if keys is None else device.put(keys, "keys")
    zq = device.put(query_clusters, "query_clusters")
    zk = zq if key_clusters is None else device.put(key_clusters, "key_clusters")
    owns = None if own is None else device.put(own, "own")
    return InfoNCEProblem(
        precision=PRECISION[queries.dtype],
        queries=q.data_ptr(),
        query_stride=q.stride(0),
        n=len(queries),
        self=keys is None,
        keys=k.data_ptr(),
        key_stride=k.stride(0),
        m=len(k),
        d=queries.shape[1],
        query_clusters=zq.data_ptr(),
        key_clusters=zk.data_ptr(),
        own=_address(owns),
        exclude_self=exclude_self and keys is None,
        inner=inner,
        ignore_index=-1,
    )


def _put_sorted(
    device: Device, problem: InfoNCEProblem, query_clusters: Tensor, key_clusters: Tensor | None
) -> None:
    sorted_queries, query_order = (
        device.put(x, "sorted queries") for x in torch.sort(query_clusters, stable=True)
    )
    sorted_keys, key_order = sorted_queries, query_order
    if key_clusters is not None:
        sorted_keys, key_order = (device.put(x, "sorted keys") for x in torch.sort(key_clusters, stable=True))
    problem.sorted_queries, problem.query_order = sorted_queries.data_ptr(), query_order.data_ptr()
    problem.sorted_keys, problem.key_order = sorted_keys.data_ptr(), key_order.data_ptr()


def _call(device: Device, function: Any, outputs: Any, *inputs: Any) -> None:
    """Twice: the first call tells how much memory the second needs."""
    for _ in range(2):
        assert function(*inputs, ctypes.byref(outputs), None) == 0
        if not outputs.workspace:
            space = device.empty(max(outputs.workspace_bytes, 1), dtype=torch.uint8, name="workspace")
            outputs.workspace = space.data_ptr()


def run_reduced(
    queries: Tensor,
    keys: Tensor | None,
    query_clusters: Tensor,
    key_clusters: Tensor | None = None,
    own: Tensor | None = None,
    *,
    mean: bool = True,
    inner: bool = False,
    scale: float = 10.0,
    upstream: float = 1.0,
    sorted_before: bool = False,
    arch: str = "90",
) -> Results:
    """The rows' mean or sum, its gradients and the gradient of the scale.

    The scale is a number of the host's and the ids are sorted by the core; or both lie in memory before.
    """
    lib = library(arch)
    n, d = queries.shape
    with Device() as device:
        problem = _problem(
            device, queries, keys, query_clusters, key_clusters, own, exclude_self=True, inner=inner
        )
        problem.constant_scale = scale
        if sorted_before:
            problem.scale = device.put(torch.tensor([scale], dtype=torch.float32), "scale").data_ptr()
            _put_sorted(device, problem, query_clusters, key_clusters)
        bytes_kept = lib.wscl_infonce_kept_bytes(ctypes.byref(problem))
        kept = device.empty(bytes_kept, dtype=torch.uint8, name="kept")
        loss, count = device.empty(1), device.empty(n, dtype=torch.int64)
        direction = device.empty(0 if keys is None else n, d, name="direction")
        forward = InfoNCEReduced(
            mean=mean,
            loss=loss.data_ptr(),
            count=count.data_ptr(),
            direction=None if keys is None else direction.data_ptr(),
            need_direction=keys is not None,
            kept=kept.data_ptr(),
        )
        _call(device, lib.wscl_infonce_reduced_forward, forward, ctypes.byref(problem))
        grad_queries = device.empty(n, d, dtype=queries.dtype, name="grad_queries")
        grad_keys = None if keys is None else device.empty(*keys.shape, dtype=keys.dtype, name="grad_keys")
        grad_loss, grad_scale = device.put(torch.tensor([upstream]), "grad_loss"), device.empty(1)
        backward = InfoNCEBackward(
            grad_loss=grad_loss.data_ptr(),
            direction=None if keys is None else direction.data_ptr(),
            grad_queries=grad_queries.data_ptr(),
            grad_keys=_address(grad_keys),
            grad_scale=grad_scale.data_ptr(),
            need_queries=True,
            need_keys=keys is not None,
            need_scale=True,
        )
        memory = ctypes.c_void_p(kept.data_ptr())
        _call(device, lib.wscl_infonce_reduced_backward, backward, ctypes.byref(problem), memory)
        launches = device.launches()
    return Results(loss, count, grad_queries, grad_keys, grad_scale, launches)


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
        problem = _problem(
            device, queries, keys, query_clusters, key_clusters, own, exclude_self=exclude_self, inner=inner
        )
        problem.precision += 1 if fast else 0
        problem.scale = device.put(torch.tensor([scale], dtype=torch.float32), "scale").data_ptr()
        _put_sorted(device, problem, query_clusters, key_clusters)

        def call(function: Any, arguments: Any) -> None:
            _call(device, function, arguments, ctypes.byref(problem))

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
