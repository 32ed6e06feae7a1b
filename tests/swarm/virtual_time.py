"""An event loop whose time jumps to the next timer as soon as nothing else is left to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ROUND_SECONDS = 1e-9
"""What a round of the loop takes: who waits for the smallest time that a number can express has waited for it then."""
MOMENT_SECONDS = 1e-3
LONGEST_MOMENT = 20_000
"""After so many rounds in one moment, somebody is going round in circles."""


class Deadlock(AssertionError):
    """Nothing is ready, and nothing will be."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what is ready, then jumps. Threads have no part in it: what is meant for them is computed at once.

    Seconds are counted from 0, and right to a microsecond for some days.
    Raises `Deadlock` when there is nothing to run and no timer to wait for, and when time stands still for too long.
    """

    def __init__(self) -> None:
        self._now = self._moment = 0.0
        self._num_rounds = 0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise Deadlock(f"nobody will ever go on at {self._now:.3f} s:\n{self._tasks()}")
        self._now += max(seconds, ROUND_SECONDS)
        self._num_rounds += 1
        if self._now - self._moment > MOMENT_SECONDS:
            self._moment, self._num_rounds = self._now, 0
        elif self._num_rounds > LONGEST_MOMENT:
            self._num_rounds = 0  # whoever cancels them needs some too
            raise Deadlock(f"time stands still at {self._now:.3f} s:\n{self._tasks()}")

    def _tasks(self) -> str:
        return "\n".join(f"    {task!r}" for task in asyncio.all_tasks(self))

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class _Jumping(selectors.SelectSelector):
    """Never waits: it says how long it would have waited."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._jump(timeout)
        return []


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns, in virtual time that begins at 0. No task must be left when it is done."""

    async def alone() -> T:
        result = await work
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            raise AssertionError("tasks are left:\n" + "\n".join(f"    {task!r}" for task in left))
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(alone())
