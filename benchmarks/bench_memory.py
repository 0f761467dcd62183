"""What a step of each loss takes above inputs and gradients: many keys, long rows, within a large batch.

Usage: python -m benchmarks.bench_memory [--only LOSS] [--threads N]

One process for each shape runs all losses, forward and backward, one after the other; the growth of the peak
resident size counts. The plain loss at many shapes and dtypes: ``bench_infonce --only memory``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import at_least_one, check_only, keep, machine, peak_memories, show, step, write_csv
from wscl_fast.functional import (
    clip_loss,
    clustered_infonce,
    hierarchical_infonce,
    siglip_loss,
    soft_infonce,
)

Loss = Callable[..., Tensor]


class Shape(NamedTuple):
    """So many queries and keys of d numbers; within the batch where there are no keys."""

    n: int
    m: int | None
    d: int

    @property
    def name(self) -> str:
        return f"{self.n} in batch x {self.d}" if self.m is None else f"{self.n} x {self.m} x {self.d}"

    def inputs(self) -> dict[str, Tensor]:
        rows = {"queries": self.n} if self.m is None else {"queries": self.n, "keys": self.m}
        return {side: normalize(torch.randn(n, self.d), dim=1) for side, n in rows.items()}


SHAPES = (Shape(128, 1 << 18, 128), Shape(4096, 4096, 768), Shape(16384, None, 128))


class Auxiliary(NamedTuple):
    """What is known of samples: 50 clusters, 8 coarse of 64 fine ones, two of 60 tags."""

    clusters: Tensor | None
    levels: Tensor | None
    tags: Tensor | None


def auxiliary(n: int) -> Auxiliary:
    fine = torch.randint(0, 64, (n,))
    one, other = (torch.ones(n, dtype=torch.int64) << torch.randint(0, 60, (n,)) for _ in range(2))
    return Auxiliary(torch.arange(n) % 50, torch.stack([fine // 8, fine], 1), one | other)


def losses(shape: Shape) -> dict[str, Loss]:
    """Every loss that there is at such a shape, as a function of queries and keys."""
    n, m, _ = shape
    own = auxiliary(n)
    of_keys = Auxiliary(None, None, None) if m is None else auxiliary(m)

    def clustered(**options: object) -> Loss:
        ids = {"query_clusters": own.clusters, "key_clusters": of_keys.clusters}
        return lambda **sides: clustered_infonce(**sides, **ids, **options)

    def levels(**options: object) -> Loss:
        ids = {"query_clusters": own.levels, "key_clusters": of_keys.levels}
        return lambda **sides: hierarchical_infonce(**sides, **ids, **options)

    def soft(**options: object) -> Loss:
        tags = {"query_auxiliary": own.tags, "key_auxiliary": of_keys.tags}
        return lambda **sides: soft_infonce(**sides, **tags, **options)

    ids = {"x_clusters": own.clusters, "y_clusters": of_keys.clusters}
    with_statistics = clustered(return_stats=True)
    found: dict[str, Loss] = {
        "out": clustered(),
        "in": clustered(positives="in"),
        'denominator="other"': clustered(denominator="other"),
        'denominator="decoupled", hardness=0.5': clustered(denominator="decoupled", hardness=0.5),
        "return_stats=True": lambda **sides: with_statistics(**sides)[0],
        "levels, out": levels(),
        "levels, in": levels(positives="in"),
        'levels, constraint="pair"': levels(constraint="pair"),
        "Jaccard, out": soft(affinity="jaccard"),
        "Jaccard, in": soft(affinity="jaccard", positives="in"),
        "cosine": soft(affinity="cosine"),
    }
    if m is not None:
        if n == m:  # a key for each query
            found["CLIP"] = lambda **sides: clip_loss(*sides.values())
        found["CLIP, clusters"] = lambda **sides: clip_loss(*sides.values(), **ids)
        found["SigLIP, clusters"] = lambda **sides: siglip_loss(*sides.values(), **ids)
    return found


def steps(shape: Shape, only: str) -> dict[str, Callable[[], Tensor]]:
    """A step of each loss that has ``only`` in its name, with the gradients of all its inputs."""
    sides = shape.inputs()
    return {name: step(loss, sides, tuple(sides)) for name, loss in losses(shape).items() if only in name}


MEMORY = """
import torch
torch.set_num_threads({threads})
from benchmarks.bench_memory import Shape, steps
for small in steps({small!r}, {only!r}).values():
    small()
measured = steps({shape!r}, {only!r})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory of every loss")
    parser.add_argument("--only", default="", help="losses that have this in their name; other rows stay")
    parser.add_argument("--threads", type=at_least_one, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    every = list(losses(Shape(1, 1, 1)))
    check_only(parser, options.only, every)
    print(machine(), flush=True)
    rows: dict[str, dict[str, object]] = {}
    for shape in SHAPES:
        small = shape._replace(n=64, m=shape.m and 64)
        script = MEMORY.format(threads=options.threads, small=small, shape=shape, only=options.only)
        gradients = 4 * shape.d * (shape.n + (shape.m or 0)) / 2**20
        for name, mib in peak_memories(script).items():
            rows.setdefault(name, {"case": name, **{other.name: "" for other in SHAPES}})
            rows[name][shape.name] = f"{mib - gradients:.0f}"
    show(list(rows.values()))
    named = [{**row, "machine": machine()} for row in rows.values()]
    write_csv("losses_memory", keep("losses_memory", named, every))


if __name__ == "__main__":
    main()
