"""Several processes over gloo, started once for all tests that need them.

Four processes run every case of a module in groups of 2, 3 and 4 of them, and each tells what failed. A case
is a function ``case(group)`` that every process of the group calls; it talks first and asserts last, so that
a failure on one rank leaves no other rank waiting. What they say is held to what NCCL can carry, which is
less than gloo can.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wscl_fast.distributed import rank, world_size

SIZES = (2, 3, 4)
TIMEOUT = datetime.timedelta(seconds=180)  # who is not in a group waits for those who are
Case = Callable[[Any], None]
SPOKEN = ("all_gather", "all_reduce", "all_to_all_single", "batch_isend_irecv", "broadcast", "reduce")
CARRIED = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
CARRIED += (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Before the processes fork from one that does nothing else: no thread runs and no group exists in it.
IMPORTED_ONCE = ["torch", "wscl_fast", "wscl_fast.clustering", "wscl_fast.distributed"]


def close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-6) -> None:
    """Relative to the largest entry: what a gradient's error is measured by."""
    assert got is not None
    assert want is not None
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size + 1e-300)


def cut(whole: Tensor, rows: list[int], group: Any) -> Tensor:
    """The rows of this rank, a leaf of its own."""
    return whole.detach().split(rows)[rank(group)].clone().requires_grad_(whole.requires_grad)


def uneven(group: Any) -> list[int]:
    """Different numbers of rows for the ranks; the last has none."""
    return {2: [5, 0], 3: [3, 5, 0], 4: [3, 5, 1, 0]}[world_size(group)]


def longest_with_width(width: int, step: Callable[[], None]) -> int:
    """The most rows of any tensor ``[rows, width]`` that a step makes."""
    longest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal longest
            out = function(*args, **(kwargs or {}))
            rows = [len(t) for t in tree_leaves(out) if isinstance(t, Tensor) and t.shape[1:] == (width,)]
            longest = max([longest, *rows])
            return out

    with Watch():
        step()
    return longest


def check_carried(said: Any) -> None:
    """Raises AssertionError where NCCL could not carry one of the tensors."""
    for leaf in tree_leaves(said):
        tensor = leaf.tensor if isinstance(leaf, dist.P2POp) else leaf
        if isinstance(tensor, Tensor):
            assert tensor.dtype in CARRIED, f"NCCL carries no {tensor.dtype}"
            assert tensor.is_contiguous(), (
                f"NCCL carries no strides {tensor.stride()} of {tuple(tensor.shape)}"
            )


def _as_nccl_has_it(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_carried((args, kwargs))
        return call(*args, **kwargs)

    return checked


def join(number: int, size: int, store: Path) -> None:
    """Make this process, of one thread, one of a group that meets at a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=size, timeout=TIMEOUT
    )


def _work(number: int, module: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    join(number, max(SIZES), Path(folder, "store"))
    for name in SPOKEN:
        setattr(dist, name, _as_nccl_has_it(getattr(dist, name)))
    cases: dict[str, Case] = importlib.import_module(module).CASES
    failures = {}
    for size in SIZES:
        group = dist.new_group(range(size), timeout=TIMEOUT)
        for name, case in cases.items() if number < size else ():
            torch.manual_seed(0)
            try:
                case(group)
            except Exception:
                failures[f"{name}-{size}"] = traceback.format_exc()
    Path(folder, f"{number}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()


def end_codes(function: Callable[..., None], size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """How the processes of ``function(rank, *arguments)`` ended; None: it had to be killed."""
    torch.multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    context = torch.multiprocessing.get_context("forkserver")
    children = [context.Process(target=function, args=(number, *arguments)) for number in range(size)]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(timeout)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()


def run(module: str, folder: Path) -> dict[str, str]:
    """The failures by ``case-size``, of all ranks."""
    torch.multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _work, (module, str(folder)), nprocs=max(SIZES), start_method="forkserver"
    )
    failures: dict[str, str] = {}
    for number in range(max(SIZES)):
        for name, text in json.loads((folder / f"{number}.json").read_text()).items():
            failures[name] = failures.get(name, "") + f"rank {number}: {text}"
    return failures
