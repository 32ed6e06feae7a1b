"""What asyncio lacks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run these until the first of them ends, and cancel the others. Raises what the first one raised."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_error_of(work)) for work in works]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
    for task in done:
        if error := task.result():
            raise error


async def _error_of(work: Coroutine[Any, Any, None]) -> Exception | None:
    """The error of `work` as a value: raised in a task group, it would come out as a group of errors."""
    try:
        await work
    except Exception as error:
        return error
    return None


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, T], *, name: str | None = None) -> AsyncIterator[asyncio.Task[T]]:
    """The task of `work`, which ends with the context at the latest. What it returns or raises is for the caller."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def while_moving(work: Coroutine[Any, Any, T], moved_at: Callable[[], float], *, seconds: float) -> T:
    """What `work` returns. Raises `TimeoutError` when nothing has moved for so many seconds, by the loop's clock."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    looking = loop.call_at(began + seconds, lambda: look())

    def look() -> None:
        nonlocal looking
        until = max(began, moved_at()) + seconds
        if until <= loop.time():
            limit.reschedule(until)
        else:
            looking = loop.call_at(until, look)

    try:
        async with asyncio.timeout(None) as limit:
            return await work
    finally:
        looking.cancel()


def now() -> float:
    """The event loop's time: the monotonic clock, unless somebody runs the loop in a time of his own."""
    return asyncio.get_running_loop().time()
