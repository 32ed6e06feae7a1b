"""An event loop whose time jumps to the next timer as soon as no task is ready."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ROUND_SECONDS = 1e-9
"""The time of one iteration of the loop, so that even the shortest sleep ends."""
MOMENT_SECONDS = 1e-3
"""The time within which iterations are counted."""
MAX_ROUNDS = 20_000
"""More iterations within `MOMENT_SECONDS` mean that a task loops without waiting."""


class Deadlock(AssertionError):
    """No task is ready and no timer is set, or time stands still."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs the ready tasks, then jumps to the next timer. Work for threads is computed at once, on this thread.

    Seconds are counted from 0, and precise to a microsecond for some days.
    Raises `Deadlock` when no task is ready and no timer is set, and when time stands still.
    """

    def __init__(self) -> None:
        self._now = self._moment = 0.0
        self._num_rounds = 0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise Deadlock(f"no task can ever continue at {self._now:.3f} s:\n{self._tasks()}")
        self._now += max(seconds, ROUND_SECONDS)
        self._num_rounds += 1
        if self._now - self._moment > MOMENT_SECONDS:
            self._moment, self._num_rounds = self._now, 0
        elif self._num_rounds > MAX_ROUNDS:
            self._num_rounds = 0  # cancelling the tasks takes iterations too
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
    """Never waits: it reports how long it would have waited."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._jump(timeout)
        return []


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, in virtual time that begins at 0. Raises `AssertionError` if it leaves a task."""

    async def alone() -> T:
        result = await work
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            raise AssertionError("tasks are left:\n" + "\n".join(f"    {task!r}" for task in left))
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(alone())
