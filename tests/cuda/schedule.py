"""The schedule that ptxas chose for the loop over tiles, for ``docs/kernels.md``: static, nothing runs.

Usage: python tests/cuda/schedule.py [CUXRAY]      (after make build/cuda/.built)

CUXRAY is the program of the PyPI package cuxray, which needs those of nvidia-cuda-nvdisasm and
nvidia-cuda-cuobjdump on PATH. Cycles are those of one warp alone: of each instruction of the loop once, its
issue and its fixed stalls, the rare paths for masks and for a new shift among them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OBJECT = ROOT / "build/cuda/CMakeFiles/wscl_core_cuda.dir/csrc/core/similarity_bfloat16.cu.o"
EPILOGUES = ("softmax", "columns", "symmetric", "row and column sums", "sigmoid", "sigmoid by columns")
# A tile's columns at d = 128, by the tiling's name and whether it gathers (similarity_launch.cuh).
COLUMNS = {"HalfTiling": 64, "HalfTiling+": 32, "Weighing": 48, "NarrowWeighing": 32, "Lean": 32}
MATRIX_CYCLES = 8  # of an m16n8k16 on an A100's tensor core


def tiling_of(kernel: str) -> str | None:
    """Of a mangled kernel of d = 128; None for others."""
    found = re.search(r"similarity_kernelINS0_(\d+)([A-Za-z]+)", kernel)
    if not found or "BFloat16ELi128E" not in kernel:
        return None
    name = found[2][: int(found[1])]
    return name + "+" * (name == "HalfTiling" and "ELi128ELb1E" in kernel)


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The table."""
    yield [
        "d = 128, bfloat16",
        "columns a tile",
        "instructions",
        "matrix",
        "instructions a matrix instruction",
        "cycles of a warp",
        "of the tensor core for it",
    ]
    made = []
    for result in found["results"]:
        tiling = tiling_of(result["kernel"])
        epilogue = re.search(r"EpilogueE(\d)ELb([01])", result["kernel"])
        if tiling is None or epilogue is None:
            continue
        loop = max(result["loops"], key=lambda x: x["instructions"])
        (matrix,) = (o["count"] for o in loop["top_stall_opcodes"] if o["opcode"] == "HMMA")
        instructions, cycles = loop["instructions"], loop["est_issue_stall_cycles_per_iter"]
        name = EPILOGUES[int(epilogue[1])] + " + output" * int(epilogue[2])
        row = [name, COLUMNS[tiling], instructions, matrix, f"{instructions / matrix:.1f}"]
        made.append((int(epilogue[1]), -COLUMNS[tiling], [*row, cycles, MATRIX_CYCLES * matrix]))
    for *_, row in sorted(made):
        yield [str(cell) for cell in row]


def main() -> int:
    from tables import renew

    program = sys.argv[1] if len(sys.argv) > 1 else "cuxray"
    said = subprocess.run(
        [program, "sched", "--json", "--kernel", "similarity_kernel", str(OBJECT)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    renew({"schedule": rows(json.loads(said.stdout))}, "schedule.py")
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT)]
    sys.exit(main())
