"""The compute thread: everything that touches weights runs here, one job at a time, the most urgent one first."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


class Priority(Enum):
    """By how many seconds a job lets later ones go first, if they are more urgent.

    Somebody waits for every token of a decoding step; nobody does for a gradient. But everybody's turn comes.
    """

    DECODE = 0.0
    PREFILL = 0.1
    TRAIN = 1.0


class Executor:
    """Runs functions on one thread of its own, in order of their deadlines: arrival plus what the priority grants."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: queue.PriorityQueue[tuple[float, int, Callable[[], None]]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._thread = threading.Thread(target=self._work, name="shoal-compute", daemon=True)
        self._thread.start()

    async def run(self, priority: Priority, function: Callable[[], T]) -> T:
        """What `function` returns or raises. If the caller is cancelled before its turn, it never runs."""
        if not self._thread.is_alive():
            raise RuntimeError("the compute thread has ended")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            if future.cancelled():
                return
            result: T | None = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as raised:  # it is raised again where it belongs: in the task that asked
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        self._jobs.put((self._clock() + priority.value, next(self._arrivals), job))
        return await future

    def close(self) -> None:
        """Finish what was asked for, then end the thread."""
        self._jobs.put((math.inf, next(self._arrivals), _stop))
        self._thread.join()

    def _work(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is _stop:
                return
            job()


def _stop() -> Any:
    """Ends the thread."""
