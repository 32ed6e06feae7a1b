"""Timeouts that depend on progress, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref

import pytest

from shoal.concurrency import (
    background,
    done_although_cancelled,
    first_of,
    in_thread,
    with_progress_timeout,
)

from . import virtual_time


class Job:
    """A task that makes progress once a second, `num_steps` times, and that ends after `seconds`."""

    def __init__(self, *, num_steps: int, seconds: float) -> None:
        self.progressed_at = 0.0
        self._num_steps = num_steps
        self._seconds = seconds

    async def run(self) -> str:
        for _ in range(self._num_steps):
            await asyncio.sleep(1.0)
            self.progressed_at = asyncio.get_running_loop().time()
        await asyncio.sleep(self._seconds - self._num_steps)
        return "done"


def waited(job: Job, *, seconds: float) -> tuple[str, float]:
    """The outcome, and the time in seconds when it came."""

    async def wait() -> tuple[str, float]:
        try:
            outcome = await with_progress_timeout(job.run(), lambda: job.progressed_at, seconds=seconds)
        except TimeoutError:
            outcome = "timed out"
        return outcome, asyncio.get_running_loop().time()

    return virtual_time.run(wait())


@pytest.mark.parametrize("num_steps", [0, 1, 100])
def test_a_coroutine_without_progress_times_out(num_steps: int):
    assert waited(Job(num_steps=num_steps, seconds=1000.0), seconds=3.0) == (
        "timed out",
        pytest.approx(num_steps + 3.0),
    )


@pytest.mark.parametrize("num_steps", [0, 1, 100])
def test_a_coroutine_with_progress_is_awaited(num_steps: int):
    assert waited(Job(num_steps=num_steps, seconds=num_steps + 2.9), seconds=3.0) == (
        "done",
        pytest.approx(num_steps + 2.9),
    )


def test_an_error_of_the_coroutine_is_raised_unchanged():
    async def wait() -> None:
        async def fail() -> None:
            await asyncio.sleep(1.0)
            raise KeyError("of its own")

        with pytest.raises(KeyError, match="of its own"):
            await with_progress_timeout(fail(), lambda: 0.0, seconds=3.0)
        await asyncio.sleep(10.0)  # the timer of the timeout does nothing any more

    virtual_time.run(wait())


async def hold(started: asyncio.Event) -> None:
    started.set()
    await asyncio.Event().wait()


@pytest.mark.anyio
async def test_background_work_is_cancelled_when_its_context_is_left() -> None:
    started = asyncio.Event()
    async with background(hold(started)) as task:
        await started.wait()
    assert task.cancelled()


@pytest.mark.anyio
async def test_an_error_beside_background_work_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError, match="here"):
        async with background(hold(asyncio.Event())) as task:
            raise KeyError("here")
    assert task.cancelled()


@pytest.mark.anyio
async def test_background_work_that_fails_ends_its_context_with_its_error() -> None:
    async def fail() -> None:
        raise ValueError("the work failed")

    with pytest.raises(ValueError, match="the work failed"):
        async with background(fail()):
            await asyncio.Event().wait()


def test_a_thread_computes_while_the_context_goes_on() -> None:
    has_gone_on = threading.Event()

    async def scene() -> int:
        async with in_thread(lambda: 7 if has_gone_on.wait(SECONDS) else 0) as result:
            assert not result.done()
            has_gone_on.set()
            return await result

    assert asyncio.run(scene()) == 7


def test_what_a_thread_raises_is_raised_where_its_result_is_awaited() -> None:
    def fails() -> int:
        raise ValueError("no")

    async def scene() -> None:
        async with in_thread(fails) as result:
            with pytest.raises(ValueError, match="no"):
                await result

    asyncio.run(scene())


def test_a_context_that_fails_waits_for_its_thread_and_raises_its_own_error() -> None:
    ended = threading.Event()

    async def scene() -> None:
        async with in_thread(ended.set):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(scene())
    assert ended.is_set()


def test_a_context_that_is_cancelled_does_not_wait_for_its_thread() -> None:
    release = threading.Event()

    async def hold() -> None:
        async with in_thread(lambda: release.wait(SECONDS)):
            await asyncio.Event().wait()

    async def scene() -> None:
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(SECONDS / 2):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not release.is_set()

    asyncio.run(scene())
    release.set()


SECONDS = 60.0
"""The limit for a wait. A test that reaches it fails."""


@pytest.mark.anyio
async def test_what_has_to_be_closed_is_closed_although_the_caller_is_cancelled() -> None:
    """Also what had not begun to close at that moment."""
    go_on, closed = asyncio.Event(), list[str]()

    async def close(name: str) -> None:
        await go_on.wait()
        closed.append(name)

    for num_turns in range(4):
        go_on.clear()
        closed.clear()
        closing = asyncio.create_task(done_although_cancelled(close("first"), close("second")))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if num_turns:  # a task that is cancelled before it begins has not been asked for anything
            closing.cancel()
        go_on.set()
        await asyncio.wait([closing])
        assert closed == ["first", "second"]
        assert closing.cancelled() == bool(num_turns)


def test_work_of_a_thread_is_done_although_the_interpreter_ends() -> None:
    """There are no more threads then, and a program may leave it to its end to close a model."""
    program = """
import asyncio, atexit
from shoal.concurrency import on_thread
atexit.register(lambda: print(asyncio.run(on_thread(lambda: "done"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


class Large:
    """Something that a work has."""


def test_what_a_work_had_that_failed_is_freed_at_once():
    """Without the garbage collector, which looks for circles of objects so rarely that servers ran out of memory."""
    known: list[weakref.ref[Large]] = []

    async def fail() -> None:
        large = Large()
        known.append(weakref.ref(large))
        await asyncio.sleep(0)
        raise ValueError("failed")

    async def scene() -> None:
        with pytest.raises(ValueError, match="failed"):
            await first_of(fail(), asyncio.Event().wait())

    gc.disable()
    try:
        virtual_time.run(scene())
        assert [each() for each in known] == [None]
    finally:
        gc.enable()
