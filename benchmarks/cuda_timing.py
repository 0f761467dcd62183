"""Time and memory of something on a device: CUDA events on a GPU, the clock on a CPU.

On a GPU each repetition starts with a cold L2 (a buffer larger than it is overwritten), is timed by a pair of
events on the stream, and nothing waits between repetitions, so that launches overlap with the work before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """Milliseconds of every repetition, and the bytes that it needed at most above what was there before."""

    ms: tuple[float, ...]
    peak_bytes: int | None  # None: not measured on this device

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.ms)

    def quantile(self, share: float) -> float:
        """Milliseconds that this share of the repetitions stays below."""
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def flush_buffer(device: torch.device) -> torch.Tensor:
    """Memory whose writing empties L2: four times as large."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return torch.empty(max(4 * size, 1), dtype=torch.int8, device=device)


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    warm_up: int = 3,
    repetitions: int = 30,
    seconds: float = 2.0,
) -> Measured:
    """Times a callable after a warm-up: so many repetitions, or fewer where they would take longer.

    At least three are made.
    """
    for _ in range(warm_up - 1):
        run()
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    once = time.perf_counter() - start
    repetitions = max(3, min(repetitions, int(seconds / max(once, 1e-9))))
    if device.type != "cuda":
        taken = []
        for _ in range(repetitions):
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
        return Measured(tuple(taken), None)
    buffer = flush_buffer(device)
    pairs = [(event(), event()) for _ in range(repetitions)]
    for before, after in pairs:
        buffer.zero_()
        before.record()
        run()
        after.record()
    synchronise(device)
    del buffer
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    return Measured(tuple(before.elapsed_time(after) for before, after in pairs), peak)


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
