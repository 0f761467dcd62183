"""The floor of a loss on a device: a bound from below, never a timing.

The floor of a launch is the time that its busiest resource (tensor cores, exponentials, instruction slots,
shared memory, DRAM …) needs at peak rate, all others being free; ptxsim's ``floor.py`` has the rates. That
of a loss is the sum over its launches. It is held against the time of the algorithm's own GEMMs on the
tensor cores at the rate of ``mma.sync``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from counters import GEMMS, Report, is_pass, launches
from simulator import counting_only, ptxsim


@dataclass(frozen=True)
class Floor:
    """Of forward and backward; milliseconds."""

    device: str
    kind: str
    n: int
    d: int
    gemms: float  # the algorithm's
    passes: float  # launches over all pairs
    rest: float  # all other launches
    bound: tuple[str, ...]  # what binds each pass
    costs: dict[str, float]  # of launches, by the kernel's name

    @property
    def ratio(self) -> float:
        """Ours over the algorithm's."""
        return (self.passes + self.rest) / self.gemms


def kernel_name(report: Report) -> str:
    """Without arguments, namespaces and types."""
    name = report["kernel"].replace("(anonymous namespace)::", "").replace("wscl::cuda::", "")
    return str(name.removeprefix("void ").split("<")[0].split("(")[0])


def find_floor(device: str, kind: str, n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Floor:
    """N = M; the launches are simulated at that very size, on a grid for that device."""
    sim = ptxsim()
    with counting_only(device):
        reports = launches(kind, n, n, d, dtype)
    peak = sim.DEVICES[device]
    macs = GEMMS[kind] * n * n * d
    kind_of = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    floors = [(r, sim.floor_ms(r, device)) for r in reports]
    costs: dict[str, float] = {}
    for report, floor in floors:
        name = kernel_name(report)
        costs[name] = costs.get(name, 0) + floor["floor_ms"]
    return Floor(
        device=device,
        kind=kind,
        n=n,
        d=d,
        gemms=macs / (peak["tensor"][kind_of] * peak["mma_fraction"] * 1e9),
        passes=sum(f["floor_ms"] for r, f in floors if is_pass(r)),
        rest=sum(f["floor_ms"] for r, f in floors if not is_pass(r)),
        bound=tuple(f["bound"] for r, f in floors if is_pass(r)),
        costs=costs,
    )
