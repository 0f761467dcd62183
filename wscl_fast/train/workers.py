"""Tasks side by side in a few processes, their progress shown in one bar.

Where the system can, workers are forked from a server that did nothing but import what they need, so that
this is done once, and beside what the caller does first.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from wscl_fast.train.monitor import Monitor

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

Task = TypeVar("Task")
POLL_SECONDS = 1.0
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()


class WorkerError(RuntimeError):
    """A task failed, or its process died."""


class _Relay:
    """A monitor in a worker: sends what it is told to the parent, and ends when the parent is gone."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    def start(self, total: int, done: int) -> None:
        self._messages.put(("advance", done, ""))

    def advance(self, images: int, note: str = "") -> None:
        if _orphaned():
            os._exit(1)  # killed parents cannot stop their workers: two must not write one folder
        self._messages.put(("advance", images, note))

    def say(self, line: str) -> None:
        pass  # the lines of one run, in between those of others, would be noise

    def stop(self) -> None:
        pass


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _work(function: Callable[[Any, Monitor], str], tasks: Any, messages: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    relay = _Relay(messages)
    while not _orphaned():
        try:
            task = tasks.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if task is None:
            break
        try:
            messages.put(("done", function(task, relay)))
        except Exception as error:
            messages.put(
                ("failed", error if _travels(error) else WorkerError(str(error)), traceback.format_exc())
            )


def _travels(error: Exception) -> bool:
    """Whether the parent can be handed this very error: a user's mistakes keep their type."""
    return type(error) in (
        ValueError,
        TypeError,
        FileNotFoundError,
        ImportError,
        ModuleNotFoundError,
        RuntimeError,
    )


def expect_workers(*modules: str) -> None:
    """Begin to import what workers of a later `run_tasks` need, in the server that they are forked from.

    Args:
        modules: their names; one that is missing is left to the worker that misses it.
    """
    if not _FORKS:
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload([*modules])
    multiprocessing.resource_tracker.ensure_running()  # the server would start it, which unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the parent's to handle
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_tasks(
    function: Callable[[Task, Monitor], str],
    tasks: Sequence[Task],
    *,
    workers: int,
    threads: int,
    monitor: Monitor,
) -> None:
    """Call `function(task, monitor)` for every task and say the line that it returns.

    Args:
        function: importable by name; works in a process of its own unless there is one worker.
        tasks: picklable.
        workers: processes; 1 stays in this one.
        threads: CPU threads of each worker.
        monitor: shown the progress of all.

    Raises:
        WorkerError: a worker died, or a task failed with an error of its own kind.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        torch.set_num_threads(threads)
        for task in tasks:
            monitor.say(function(task, monitor))
        return
    context: ForkServerContext | SpawnContext = (
        multiprocessing.get_context("forkserver") if _FORKS else multiprocessing.get_context("spawn")
    )
    waiting, messages = context.Queue(), context.Queue()
    for item in (*tasks, *[None] * workers):
        waiting.put(item)
    processes = [
        context.Process(target=_work, args=(function, waiting, messages, threads), daemon=True)
        for _ in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        left = len(tasks)
        while left:
            try:
                kind, *content = messages.get(timeout=POLL_SECONDS)
            except queue.Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise WorkerError(f"a worker died with exit code {dead[0].exitcode}") from None
                continue
            if kind == "advance":
                monitor.advance(*content)
            elif kind == "done":
                left -= 1
                monitor.say(content[0])
            else:
                error, trace = content
                raise error from WorkerError(trace)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for channel in (waiting, messages):
            channel.cancel_join_thread()
            channel.close()
