"""Sides of a comparison that live in a process of their own.

Libraries read some settings (OPENBLAS_CORETYPE, OMP_NUM_THREADS) once, when they are loaded, and the best
setting of one library is the worst of another. A child process has its own, waits between its turns, and
tells how long its side took, so that the turns of a comparison still alternate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.harness import Seconds


class Elsewhere:
    """One side in a child process that runs a module of `benchmarks` and answers every line with seconds.

    Args:
        module: run as ``python -m module arguments…``; it calls :func:`serve`.
        arguments: of the module.
        environment: what to set, or with None to unset, before anything is loaded.

    Raises:
        ImportError: the child could not load what it is about.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str | None] | None = None
    ) -> None:
        wanted = {**os.environ, **(environment or {})}
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={name: value for name, value in wanted.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.result = ""  # what the side said of its last turn beside the time
        self.ready = self._answer()
        if self.ready.startswith("missing "):
            self.close()
            raise ImportError(self.ready.removeprefix("missing "))

    def __call__(self) -> Seconds:
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        seconds, _, self.result = self._answer().partition(" ")
        return Seconds(seconds)

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def _answer(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the child process ended with {self._child.wait()}")
        return line.strip()
