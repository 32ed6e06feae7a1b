"""The compute thread: everything that touches weights runs here, one job at a time, the most urgent kind first."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """Somebody waits for every token of a decoding step; nobody does for a gradient."""

    DECODE = 0
    PREFILL = 1
    TRAIN = 2
    STOP = 3


class Executor:
    """Runs functions on one thread of its own, by priority and then in order of arrival."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[Priority, int, Callable[[], None]]] = queue.PriorityQueue()
        self._arrivals = itertools.count()
        self._thread = threading.Thread(target=self._work, name="shoal-compute", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return self._jobs.qsize()

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

        self._jobs.put((priority, next(self._arrivals), job))
        return await future

    def close(self) -> None:
        """Finish what was asked for, then end the thread."""
        self._jobs.put((Priority.STOP, next(self._arrivals), _stop))
        self._thread.join()

    def _work(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is _stop:
                return
            job()


def _stop() -> Any:
    """Ends the thread."""
