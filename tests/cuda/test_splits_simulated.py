"""More rows than one wave of CTAs takes: the last wave's columns are split, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from counters import Report, is_pass
from simulator import ptxsim
from test_infonce_simulated import Case, deviations, simulate

pytestmark = pytest.mark.simulated

IN_FULL = pytest.mark.skipif(os.environ.get("WSCL_SIMULATE") != "all", reason="make simulate: many rows")
WAVE = 2 * 108  # CTAs of an A100 at a time, by choose_split's own count
BLOCK = 128  # rows of a CTA
MANY, FEW = WAVE * BLOCK + 140, 520


@pytest.fixture
def _on_an_a100() -> Iterator[None]:
    sim = ptxsim()
    sim.set_option("DEVICE", "A100")
    yield
    sim.set_option("DEVICE", "H100")


def rows_stored(report: Report) -> float:
    """Rows of output, all parts together, by the bytes that were stored; d = 8."""
    return float(report["global"]["store_bytes"] / (8 * 4))


@pytest.mark.usefixtures("_on_an_a100")
@pytest.mark.parametrize(
    ("n", "m", "inner"),
    [
        (FEW, MANY, False),
        pytest.param(MANY, FEW, False, marks=IN_FULL),
        pytest.param(MANY, FEW, True, marks=IN_FULL),
    ],
)
def test_the_last_wave_alone_is_split(n: int, m: int, inner: bool) -> None:
    case = Case(n, m, 8, torch.bfloat16, inner=inner, own=True)
    got = simulate(case)
    for name, found in deviations(case, got).items():
        assert found.error <= found.most, (name, found)
    long = [r for r in got.launches if is_pass(r) and r["grid"][0] == WAVE + 2]
    assert long
    for report in long:
        assert report["grid"][1] == 2
        # Every row once, the last two blocks' twice; a row's shift and sum are a quarter of its output.
        assert MANY + 140 <= rows_stored(report) <= 1.25 * (MANY + 140)
