"""The simulator's detectors are alive on our own kernels: each has to find what a mutation broke."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from mutations import Mutation, build, mutate, run_pass
from simulator import ptxsim

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


@pytest.fixture
def quiet() -> Any:
    sim = ptxsim()
    sim.set_option("QUIET", True)
    yield sim
    sim.reset()
    sim.set_option("QUIET", False)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_kernel_as_it_is_has_no_fault(precision: str) -> None:
    run_pass(build(precision).wscl_pass, precision)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_fault_is_found(mutation: Mutation, tmp_path: Path, quiet: Any) -> None:
    lib = build(mutation.precision, mutate(mutation, tmp_path))
    with pytest.raises((quiet.KernelFault, AssertionError)) as raised:
        run_pass(lib.wscl_pass, mutation.precision)
    kinds = {fault["kind"] for fault in quiet.faults()} | {getattr(raised.value, "kind", None)}
    assert kinds & mutation.faults, kinds


def test_every_detector_has_a_fault_of_its_own() -> None:
    alone = [mutation.faults for mutation in MUTATIONS if len(mutation.faults) == 1]
    assert frozenset().union(*alone) == DETECTORS


def test_a_mutation_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    nothing = dataclasses.replace(MUTATIONS[0], pattern="no such text")
    with pytest.raises(AssertionError, match="found 0 times, not 1"):
        mutate(nothing, tmp_path)
