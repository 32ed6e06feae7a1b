"""Helpers that asyncio lacks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run these until the first of them ends, and cancel the others. Raises what the first one raised."""
    error = await _first_error(*works)
    try:
        if error is not None:
            raise error
    finally:
        # The error's traceback has this frame. If this frame had the error too, all that the failed work held would
        # stay in memory until the garbage collector looks for such circles.
        del error


async def _first_error(*works: Coroutine[Any, Any, None]) -> Exception | None:
    """The error of the first of these that ends, as a value."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_error_of(work)) for work in works]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
    return next((error for task in done if (error := task.result()) is not None), None)


async def _error_of(work: Coroutine[Any, Any, None]) -> Exception | None:
    """The error of `work` as a value: raised in a task group, it would come out as a group of errors."""
    try:
        await work
    except Exception as error:
        return error
    return None


def raise_error_of(task: asyncio.Task[None] | None) -> None:
    """Raise the error of a task that has failed; nothing if it runs, or if there is none."""
    if task is not None and task.done():
        task.result()


@contextlib.asynccontextmanager
async def owned_task(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """The task of `work`, which ends with the context at the latest. Its result and its error are for the caller."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def in_thread(function: Callable[[], T]) -> AsyncIterator[asyncio.Future[T]]:
    """The result of a function that a thread of its own computes meanwhile, for work such as large imports.

    A context that is cancelled does not wait for the thread; every other end does.
    """
    computed: concurrent.futures.Future[T] = concurrent.futures.Future()
    computed.set_running_or_notify_cancel()

    def work() -> None:
        try:
            computed.set_result(function())
        except BaseException as error:
            computed.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    future = asyncio.wrap_future(computed)
    try:
        yield future
    except asyncio.CancelledError:
        raise
    except BaseException:
        await asyncio.to_thread(thread.join)
        raise
    finally:
        if not future.cancel() and not future.cancelled():
            future.exception()  # it counts as seen: the context has ended
    await asyncio.to_thread(thread.join)


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


async def on_thread(function: Callable[[], T]) -> T:
    """What `function` returns, from another thread; from this one while the interpreter ends, when there are no more.

    For what also happens when a model is closed, which a program may leave to its end.
    """
    try:
        computing = asyncio.get_running_loop().run_in_executor(None, function)
    except RuntimeError:  # the executor is shut down
        return function()
    return await computing


async def done_although_cancelled(*closing: Coroutine[Any, Any, object]) -> None:
    """Run these at the same time, to their ends also if the caller is cancelled meanwhile."""
    work = asyncio.gather(*closing)
    try:
        await asyncio.shield(work)
    finally:
        await work  # tasks that are cancelled before they begin would close nothing


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
