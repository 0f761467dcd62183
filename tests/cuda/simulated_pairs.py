"""The passes over pairs through the simulated CUDA core: log-sum-exps, two-way ones, sums of softplus."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import Any

import torch
from simulator import PRECISION, Device, InfoNCEProblem, library
from torch import Tensor

MEETS = {"all": 0, "same": 1, "other": 2}


class PairsProblem(ctypes.Structure):
    """``wscl::cuda::PairsProblem``."""

    _fields_ = (("pairs", InfoNCEProblem), ("meets", ctypes.c_int))


def _struct(name: str, pointers: str, flags: str = "") -> Any:
    """The outputs of a pass: pointers, flags, then the workspace."""
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_bool) for field in flags.split()]
    fields += [("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_int64)]
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields)})


LogSumExpForward = _struct("LogSumExpForward", "lse stats mean", "need_mean")
LogSumExpKeyGradient = _struct("LogSumExpKeyGradient", "grad stats grad_keys")
TwoWayForward = _struct("TwoWayForward", "row_lse column_lse row_stats column_stats")
TwoWayBackward = _struct(
    "TwoWayBackward",
    "grad_rows grad_columns row_stats column_stats grad_queries grad_keys",
    "need_queries need_keys",
)
SoftplusForward = _struct("SoftplusForward", "offset sum slope direction", "need_direction")
SoftplusKeyGradient = _struct("SoftplusKeyGradient", "offset grad grad_keys")
STRUCTS = (
    PairsProblem,
    LogSumExpForward,
    LogSumExpKeyGradient,
    TwoWayForward,
    TwoWayBackward,
    SoftplusForward,
    SoftplusKeyGradient,
)


class PairPasses(AbstractContextManager["PairPasses"]):
    """Queries and keys on the simulated device, for as long as the ``with`` block lasts."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        own: Tensor | None = None,
        *,
        scale: float = 10.0,
        meets: str = "all",
        arch: str = "90",
    ) -> None:
        self.library = library(arch)
        for which, struct in enumerate(STRUCTS):
            assert self.library.wscl_pairs_size(which) == ctypes.sizeof(struct), struct.__name__
        self.device = Device()
        self._inputs = (queries, keys, query_ids, key_ids, own)
        self.n, self.m, self.d, self.dtype = len(queries), len(keys), queries.shape[1], queries.dtype
        self._scale, self._meets = scale, meets

    def __enter__(self) -> PairPasses:
        put = self.device.__enter__().put

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else put(tensor).data_ptr()

        queries, keys, query_ids, key_ids, own = self._inputs
        pairs = InfoNCEProblem(
            precision=PRECISION[self.dtype],
            queries=address(queries),
            query_stride=self.d,
            n=self.n,
            keys=address(keys),
            key_stride=self.d,
            m=self.m,
            d=self.d,
            query_clusters=address(query_ids),
            key_clusters=address(key_ids),
            own=address(own),
            inner=self._meets != "all",
            ignore_index=-1,
            scale=address(torch.tensor([self._scale])),
        )
        if self._meets != "all":
            assert query_ids is not None
            assert key_ids is not None
            pairs.sorted_queries, pairs.query_order = map(address, torch.sort(query_ids, stable=True))
            pairs.sorted_keys, pairs.key_order = map(address, torch.sort(key_ids, stable=True))
        self.problem = PairsProblem(pairs, MEETS[self._meets])
        return self

    def __exit__(self, *exception: Any) -> None:
        self.device.__exit__(*exception)

    def call(self, name: str, arguments: Any) -> None:
        """Runs a pass: the first call tells how much memory the second needs."""
        for _ in range(2):
            function = getattr(self.library, name)
            assert function(ctypes.byref(self.problem), ctypes.byref(arguments), None) == 0
            if not arguments.workspace:
                space = self.device.empty(
                    max(arguments.workspace_bytes, 1), dtype=torch.uint8, name="workspace"
                )
                arguments.workspace = space.data_ptr()

    def logsumexp(self, grad: Tensor) -> dict[str, Tensor]:
        """Log-sum-exps, and the gradients of a weighted sum of them."""
        empty, put = self.device.empty, self.device.put
        lse, stats = empty(self.n), empty(2, self.n, dtype=torch.float64)
        mean, grad_keys = empty(self.n, self.d), empty(self.m, self.d, dtype=self.dtype)
        self.call(
            "wscl_logsumexp",
            LogSumExpForward(
                lse=lse.data_ptr(), stats=stats.data_ptr(), mean=mean.data_ptr(), need_mean=True
            ),
        )
        self.call(
            "wscl_logsumexp_key_gradient",
            LogSumExpKeyGradient(
                grad=put(grad).data_ptr(), stats=stats.data_ptr(), grad_keys=grad_keys.data_ptr()
            ),
        )
        grad_queries = self._scale * torch.where(stats[1] == 0, 0.0, grad)[:, None] * mean
        return {"lse": lse, "grad_queries": grad_queries, "grad_keys": grad_keys}

    def two_way(self, grad_rows: Tensor, grad_columns: Tensor) -> dict[str, Tensor]:
        """Log-sum-exps of both directions, and the gradients of a weighted sum of them."""
        empty, put = self.device.empty, self.device.put
        rows, columns = empty(self.n), empty(self.m)
        row_stats = empty(2, self.n, dtype=torch.float64)
        column_stats = empty(2, self.m, dtype=torch.float64)
        grad_queries, grad_keys = empty(self.n, self.d), empty(self.m, self.d)
        self.call(
            "wscl_two_way",
            TwoWayForward(
                row_lse=rows.data_ptr(),
                column_lse=columns.data_ptr(),
                row_stats=row_stats.data_ptr(),
                column_stats=column_stats.data_ptr(),
            ),
        )
        self.call(
            "wscl_two_way_backward",
            TwoWayBackward(
                grad_rows=put(grad_rows).data_ptr(),
                grad_columns=put(grad_columns).data_ptr(),
                row_stats=row_stats.data_ptr(),
                column_stats=column_stats.data_ptr(),
                grad_queries=grad_queries.data_ptr(),
                grad_keys=grad_keys.data_ptr(),
                need_queries=True,
                need_keys=True,
            ),
        )
        return {"rows": rows, "columns": columns, "grad_queries": grad_queries, "grad_keys": grad_keys}

    def softplus(self, offset: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Sums of softplus, and the gradients of a weighted sum of them."""
        empty, put = self.device.empty, self.device.put
        total, slope, direction = empty(self.n), empty(self.n), empty(self.n, self.d)
        grad_keys, offsets = empty(self.m, self.d, dtype=self.dtype), put(offset)
        self.call(
            "wscl_softplus",
            SoftplusForward(
                offset=offsets.data_ptr(),
                sum=total.data_ptr(),
                slope=slope.data_ptr(),
                direction=direction.data_ptr(),
                need_direction=True,
            ),
        )
        self.call(
            "wscl_softplus_key_gradient",
            SoftplusKeyGradient(
                offset=offsets.data_ptr(), grad=put(grad).data_ptr(), grad_keys=grad_keys.data_ptr()
            ),
        )
        return {
            "total": total,
            "grad_queries": self._scale * grad[:, None] * direction,
            "grad_keys": grad_keys,
            "grad_offset": grad * slope,
        }
