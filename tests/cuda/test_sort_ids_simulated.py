"""The sort of short lists of ids in one launch, against PyTorch's stable sort."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from simulator import Device, IdList, library
from torch import Tensor

pytestmark = pytest.mark.simulated

IN_FULL = pytest.mark.skipif(
    os.environ.get("WSCL_SIMULATE") != "all", reason="make simulate: nvcc compiles for each architecture"
)
LARGEST = torch.iinfo(torch.int64).max


def ids(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(-LARGEST, LARGEST, (count,), generator=generator)
    return {
        "alike": torch.full((count,), -7),
        "few": drawn % 5 - 1,
        "clusters": drawn % 3000 - 1,
        "samples": torch.arange(count).flip(0),
        "hashes": drawn,
        "ends": torch.where(drawn > 0, LARGEST, -LARGEST - 1),
        "high": (drawn % 7) << 40,
    }[kind]


def check(*lists: Tensor, arch: str = "90") -> None:
    with Device() as device:
        made, found = [], []
        for one in lists:
            results = [device.empty(len(one), dtype=torch.int64) for _ in range(2)]
            spare = device.empty(2 * len(one), dtype=torch.int64)
            given = device.put(one, "ids")
            pointers = (tensor.data_ptr() for tensor in (*results, spare))
            made.append(IdList(given.data_ptr(), len(one), *pointers))
            found.append((given, results, spare))
        assert library(arch).wscl_sort_ids((IdList * len(made))(*made), len(made), None) == 0
        for one, (_, results, _) in zip(lists, found, strict=True):
            for got, want in zip(results, torch.sort(one, stable=True), strict=True):
                assert torch.equal(got, want)
        assert len(device.launches()) == 1


@pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=IN_FULL), "90", pytest.param("100", marks=IN_FULL)]
)
@pytest.mark.parametrize("count", [1, 31, 33, 1000, 5000])
def test_one_list(count: int, arch: str) -> None:
    check(ids("clusters", count), arch=arch)


@pytest.mark.parametrize("kind", ["alike", "few", "samples", "hashes", "ends", "high"])
def test_every_kind_of_ids(kind: str) -> None:
    check(ids(kind, 1500))


def test_two_lists_of_which_one_may_be_empty() -> None:
    check(ids("few", 70), ids("hashes", 2100))
    check(ids("few", 0), ids("few", 40))
    check(ids("few", 40), ids("few", 0))


def test_a_long_list_is_refused() -> None:
    made = IdList(None, (1 << 16) + 1, None, None, None)
    assert library().wscl_sort_ids(ctypes.byref(made), 1, None) != 0
