"""What ways to cut a pass into CTAs cost, by the model of ``choose_split`` (csrc/core/similarity_cuda.cu).

Usage: python tests/cuda/grid.py      (prints the tables of docs/kernels.md, "A persistent grid")

Time is in columns that a CTA goes through. One part of a block of rows costs PART of them beside its columns;
ROOM CTAs run at a time. All of d = 128, numbers of 2 bytes, with an output.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK = 128  # rows
PART = 400
MOST_BYTES = 64 << 20
WIDTH = 128
ROOM = {"H100": 2 * 132, "A100": 2 * 108}


@dataclass(frozen=True)
class Problem:
    """Rows, columns, and the CTAs that run at a time."""

    n: int
    m: int
    room: int

    @property
    def blocks(self) -> int:
        return math.ceil(self.n / BLOCK)

    def most_parts(self, blocks: int) -> int:
        """Parts that memory and the columns allow."""
        rows = min(self.n, blocks * BLOCK)
        return max(1, min(self.m // 256, 4 * self.room, MOST_BYTES // max(1, rows * WIDTH * 4)))

    def split(self, blocks: int) -> float:
        """So many blocks, all in as many parts as cost least."""
        return min(
            (
                math.ceil(blocks * parts / self.room) * (self.m / parts + PART)
                for parts in range(1, self.most_parts(blocks) + 1)
            ),
        )

    def one_split(self) -> float:
        """All blocks in as many parts as each other."""
        return self.split(self.blocks)

    def last_wave_split(self) -> float:
        """Whole waves in one part, the rest in several; or as above."""
        waves = self.blocks // self.room
        return min(
            whole * (self.m + PART) + self.split(self.blocks - whole * self.room)
            for whole in {0, max(0, waves - 1), waves}
        )

    def equal_shares(self) -> float:
        """As many CTAs as run at a time, each with an equal share of all tiles, wherever it ends."""
        ctas = min(self.room, self.blocks * max(1, self.m // 64))
        share = self.blocks * self.m / ctas
        parts = (
            math.ceil((i + 1) * share / self.m - 1e-9) - math.floor(i * share / self.m + 1e-9)
            for i in range(ctas)
        )
        return share + PART * max(parts)


def sweep() -> Iterable[int]:
    """Numbers of rows, ten an octave."""
    return (int(2 ** (10 + i / 10)) for i in range(81))


def main() -> None:
    sizes = (1024, 4096, 8192, 16384, 32768, 36044, 52428, 65536, 72089, 131072)
    print("| time over that of one split, N = M | " + " | ".join(map(str, sizes)) + " |")
    print("|:---|" + "---:|" * len(sizes))
    for device, room in ROOM.items():
        problems = [Problem(n, n, room) for n in sizes]
        for name in ("equal_shares", "last_wave_split"):
            ratios = [getattr(p, name)() / p.one_split() for p in problems]
            print(f"| {device}, {name.replace('_', ' ')} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |")
    print("\nOver N of 2^10 to 2^18, ten an octave; M = N, 4096, 65536:")
    for device, room in ROOM.items():
        for m in (0, 4096, 65536):
            problems = [Problem(n, m or n, room) for n in sweep()]
            for low, high in ((0, 8192), (8192, 32768), (32768, 1 << 62)):
                some = [p for p in problems if low <= p.n < high]
                shares = [p.equal_shares() / p.last_wave_split() for p in some]
                last = [p.last_wave_split() / p.one_split() for p in some]
                print(
                    f"{device}, M = {m or 'N'}, N from {low}: last wave split / one split"
                    f" {statistics.mean(last):.3f} (least {min(last):.2f}),"
                    f" equal shares / last wave split {statistics.mean(shares):.3f}"
                    f" ({min(shares):.2f} to {max(shares):.2f})"
                )


if __name__ == "__main__":
    main()
