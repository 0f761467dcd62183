"""What a run shows while it works: a progress bar with images/s and the time left, and lines above it."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from tqdm import tqdm


class Monitor(Protocol):
    """Receives the progress of a run."""

    def start(self, total: int, done: int) -> None:
        """A run of `total` images begins, `done` of them in an earlier life."""

    def advance(self, images: int, note: str = "") -> None:
        """`images` more are done; `note` says where the run stands."""

    def say(self, line: str) -> None:
        """Show a line."""

    def stop(self) -> None:
        """The run is over."""


class Silent:
    """Shows nothing."""

    def start(self, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, images: int, note: str = "") -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Bar:
    """A tqdm bar on a terminal; where there is none, a line every `quiet_seconds`.

    Args:
        quiet_seconds: between two lines without a terminal; None: no such lines.
    """

    def __init__(self, quiet_seconds: float | None = None) -> None:
        self._quiet_seconds = quiet_seconds
        self._bar: tqdm[Any] | None = None
        self._total = self._done = self._earlier = 0
        self._began = self._spoke = 0.0

    def start(self, total: int, done: int) -> None:
        """Open the bar."""
        self._total, self._done, self._earlier = total, done, done
        self._began = self._spoke = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="img",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
            mininterval=0.3,
            smoothing=0.05,
            bar_format="{percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def advance(self, images: int, note: str = "") -> None:
        """Move the bar."""
        assert self._bar is not None
        self._done += images
        if not self._bar.disable:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(images)
        elif self._quiet_seconds is not None and time.monotonic() - self._spoke > self._quiet_seconds:
            self._spoke = time.monotonic()
            rate = max(self._done - self._earlier, 1) / (self._spoke - self._began)
            left = tqdm.format_interval(max(self._total - self._done, 0) / rate)
            print(f"{self._done / self._total:4.0%}  {rate:,.0f} img/s, {left} left", flush=True)

    def say(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def stop(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
