"""Helpers that asyncio lacks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until the first of them ends, then cancel the others. Raises what the first one raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None], *, name: str | None = None) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` as a task while the context lasts, and cancel it at the end.

    If `work` fails, the context is cancelled. The one error of the two is raised as it is, not in a group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work, name=name)
            try:
                yield task
            finally:
                task.cancel()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def with_progress_timeout(
    coroutine: Coroutine[Any, Any, T], progressed_at: Callable[[], float], *, seconds: float
) -> T:
    """Run a coroutine for as long as it makes progress; returns its result.

    `progressed_at` is the time of the last progress by the loop's clock. Raises `TimeoutError` if there is none for
    `seconds`.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    checking = loop.call_at(started + seconds, lambda: check())

    def check() -> None:
        nonlocal checking
        deadline = max(started, progressed_at()) + seconds
        if deadline <= loop.time():
            limit.reschedule(deadline)
        else:
            checking = loop.call_at(deadline, check)

    try:
        async with asyncio.timeout(None) as limit:
            return await coroutine
    finally:
        checking.cancel()


def now() -> float:
    """The event loop's time in seconds: the monotonic clock, or virtual time in tests."""
    return asyncio.get_running_loop().time()
