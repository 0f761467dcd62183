"""The simulator's detectors are alive on our own kernels: each has to find what a mutation broke."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Mutation, build, mutate
from simulator import (
    BFLOAT16,
    COLUMNS,
    FLOAT32,
    SOFTMAX,
    SYMMETRIC,
    Device,
    SimilarityParams,
    ptxsim,
    rows,
)

pytestmark = pytest.mark.simulated

RACES = frozenset({"shared-race", "async-copy-race", "uninitialised-shared"})
# What a kernel may do wrong, each of which a mutation has to show by itself.
DETECTORS = RACES | {"out-of-bounds", "misaligned", "uninitialised-global", "global-race"}
MUTATIONS = [
    Mutation(
        "no barrier before a tile is read",
        r"(WSCL_TILE_BARRIER|__syncthreads)\(\);  // everyone's copies",
        "//",
        RACES,
    ),
    Mutation(
        "no barrier after float32 is split",
        r"(WSCL_TILE_BARRIER|__syncthreads)\(\);  // the planes are whole\n      return",
        "return",
        RACES,
        precision="float32",
    ),
    Mutation(
        "no barrier before the planes are written again",
        r"__syncthreads\(\);  // every warp is done with the planes",
        "//",
        frozenset({"shared-race"}),
        precision="float32",
    ),
    Mutation(
        "no wait for asynchronous copies",
        r"copy_wait<T::kStages - 2>\(\);",
        "",
        frozenset({"async-copy-race"}),
    ),
    Mutation(
        "rows past the last are loaded",
        r"const int left = live\(row0 \+ i \* kStep\) \? present : 0;",
        "const int left = present;",
        frozenset({"out-of-bounds"}),
    ),
    Mutation(
        "rows past the last are stored",
        r"if \(r >= p\.x\.count\) continue;",
        "",
        frozenset({"out-of-bounds", "global-race"}),  # those of the first part lie in the second
    ),
    Mutation(
        "any row counts as aligned",
        r"rows\.stride \* size\)\) & 15\) == 0",
        "rows.stride * size)) & 1) == 0",
        frozenset({"misaligned"}),
    ),
    Mutation(
        "every part stores to the first one's place",
        r"part_place\(p, split, r\) \* p\.output_stride",
        "int64_t(r) * p.output_stride",
        frozenset({"global-race"}),
    ),
    Mutation(
        "a sum is added to what memory holds",
        r"p\.sum\[to\] = sum;",
        "p.sum[to] += sum;",
        frozenset({"uninitialised-global"}),
    ),
    Mutation(
        "shifts and weights of rows are not stored",
        r"store_row_vectors<T>\(p, row0, x_tile \+ T::kRowVectors\);",
        ";",
        frozenset({"uninitialised-shared"}),
    ),
]


def run_pass(lib: ctypes.CDLL, precision: str) -> None:
    """The three epilogues over ragged sizes, rows that are not aligned among them."""
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    torch.manual_seed(0)
    for epilogue, (n, m, d) in (
        (SOFTMAX, (65, 300, 64)),
        (COLUMNS, (65, 300, 64)),
        (SYMMETRIC, (130, 130, 64)),
        (SOFTMAX, (65, 300, 33)),
    ):
        with Device() as device:
            x = device.put(torch.randn(n, d).to(dtype), "x")
            y = x if epilogue == SYMMETRIC else device.put(torch.randn(m, d).to(dtype), "y")
            vectors = [device.put(torch.ones(384), "vectors") for _ in range(4)]
            one_shift = device.put(torch.ones(1, dtype=torch.int32), "one shift")
            scale, splits, stride = device.put(torch.tensor([0.1]), "scale"), 2, -(-d // 4) * 4
            outputs = [device.empty(splits, n, name="shift"), device.empty(splits, n, name="sum")]
            output = device.empty(splits, n, stride, name="output")
            params = SimilarityParams(
                precision={"bfloat16": BFLOAT16, "float32": FLOAT32}[precision],
                epilogue=epilogue,
                x=rows(x),
                y=rows(y),
                d=d,
                scale=scale.data_ptr(),
                row_shift=vectors[0].data_ptr(),
                row_weight=vectors[1].data_ptr(),
                column_shift=vectors[2].data_ptr(),
                column_weight=vectors[3].data_ptr(),
                one_shift=one_shift.data_ptr(),
                splits=splits,
                shift=outputs[0].data_ptr(),
                sum=outputs[1].data_ptr(),
                output=output.data_ptr(),
                output_stride=stride,
            )
            assert lib.wscl_pass(ctypes.byref(params), None) == 0


@pytest.fixture
def quiet() -> Any:
    sim = ptxsim()
    sim.set_option("QUIET", True)
    yield sim
    sim.reset()
    sim.set_option("QUIET", False)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_kernel_as_it_is_has_no_fault(precision: str) -> None:
    run_pass(build(precision), precision)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_fault_is_found(mutation: Mutation, tmp_path: Path, quiet: Any) -> None:
    lib = build(mutation.precision, mutate(mutation, tmp_path))
    with pytest.raises((quiet.KernelFault, AssertionError)) as raised:
        run_pass(lib, mutation.precision)
    kinds = {fault["kind"] for fault in quiet.faults()} | {getattr(raised.value, "kind", None)}
    assert kinds & mutation.faults, kinds


def test_every_detector_has_a_fault_of_its_own() -> None:
    alone = [mutation.faults for mutation in MUTATIONS if len(mutation.faults) == 1]
    assert frozenset().union(*alone) == DETECTORS


def test_a_mutation_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    nothing = dataclasses.replace(MUTATIONS[0], pattern="no such text")
    with pytest.raises(AssertionError, match="found 0 times, not 1"):
        mutate(nothing, tmp_path)
