"""The tables of ``docs/kernels.md`` that the simulator's counts and ptxas's log give.

Usage: python tests/cuda/tables.py      (make simulate; needs build/cuda/ptxas.log)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"


def counters() -> Iterator[list[str]]:
    """A row for each pass at N = M = 1024."""
    import torch
    from counters import GEMMS, passes
    from resources import LOG, read

    kernels = {r.kernel: r for r in read(LOG.read_text())}
    yield [
        "d",
        "loss (its GEMMs)",
        "pass",
        "GEMMs",
        "exponentials a pair",
        "sectors / tiles' need",
        "coalescing",
        "bank passes / conflict-free",
        "PTX instructions a matrix instruction",
        "registers, spilled bytes (sm_80)",
        "CTAs an SM (sm_80, sm_90) by shared memory",
    ]
    for d in (64, 128, 256):
        for kind, gemms in GEMMS.items():
            if kind == "keys detached":  # the first pass of both gradients
                continue
            for p in passes(kind, 1024, 1024, d, torch.bfloat16):
                found = kernels.get(p.report["mangled"])
                yield [
                    str(d),
                    f"{kind} ({gemms:g})",
                    p.epilogue + (" + output" if p.output else ""),
                    f"{p.gemms:.3f}",
                    f"{p.exponentials:.3f}",
                    f"{p.sectors:.3f}",
                    f"{p.coalescing:.2f}",
                    f"{p.shared:.3f}",
                    f"{p.issue:.2f}",
                    f"{found.registers}, {found.spill_stores}" if found else "",
                    ", ".join(map(str, p.occupancy)),
                ]


def floors() -> Iterator[list[str]]:
    """A row for each device and loss at N = M = 8192, d = 128, bfloat16."""
    from counters import GEMMS
    from floor import find_floor

    yield [
        "device",
        "loss (its GEMMs)",
        "its GEMMs, ms",
        "floor of ours, ms",
        "ratio",
        "passes bound by",
        "largest of the rest",
    ]
    for device in ("H100", "A100"):
        for kind, gemms in GEMMS.items():
            found = find_floor(device, kind, 8192, 128)
            rest = {
                n: c
                for n, c in found.costs.items()
                if not n.endswith(("similarity_kernel", "streamed_kernel"))
            }
            largest = sorted(rest.items(), key=lambda item: -item[1])[:2]
            yield [
                device,
                f"{kind} ({gemms:g})",
                f"{found.gemms:.4f}",
                f"{found.passes + found.rest:.4f}",
                f"{found.ratio:.2f}",
                ", ".join(found.bound),
                ", ".join(f"`{name}` {cost / found.gemms:.3f}" for name, cost in largest),
            ]


def put(text: str, name: str, rows: list[list[str]], program: str) -> str:
    """The document with a table between its marks."""
    from matrix import table

    begin, end = f"<!-- {name}: tests/cuda/{program} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{DOCUMENT}: expected one {begin} … {end}")
    made = "\n".join([begin, *table(rows), end])
    return pattern.sub(lambda _: made, text)


def renew(tables: dict[str, Iterator[list[str]]], program: str) -> None:
    """Puts tables into the document, between the marks that name the program."""
    made = {name: list(rows) for name, rows in tables.items()}  # takes minutes, in which others may write
    text = DOCUMENT.read_text()
    for name, table in made.items():
        text = put(text, name, table, program)
    part = DOCUMENT.with_suffix(".part")
    part.write_text(text)
    part.replace(DOCUMENT)
    print(f"tables: {DOCUMENT}", flush=True)


def main() -> int:
    renew({"counters": counters(), "floor": floors()}, "tables.py")
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    sys.exit(main())
