"""Waiting for something that moves, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from shoal.concurrency import background, while_moving

from . import virtual_time


class Belt:
    """Something that moves once a second, so many times, and is done after so many seconds."""

    def __init__(self, *, moves: int, seconds: float) -> None:
        self.moved_at = 0.0
        self._moves = moves
        self._seconds = seconds

    async def run(self) -> str:
        for _ in range(self._moves):
            await asyncio.sleep(1.0)
            self.moved_at = asyncio.get_running_loop().time()
        await asyncio.sleep(self._seconds - self._moves)
        return "done"


def waited(belt: Belt, *, seconds: float) -> tuple[str, float]:
    """What came of it, and when."""

    async def wait() -> tuple[str, float]:
        try:
            outcome = await while_moving(belt.run(), lambda: belt.moved_at, seconds=seconds)
        except TimeoutError:
            outcome = "given up"
        return outcome, asyncio.get_running_loop().time()

    return virtual_time.run(wait())


@pytest.mark.parametrize("moves", [0, 1, 100])
def test_what_stands_still_is_given_up(moves: int):
    assert waited(Belt(moves=moves, seconds=1000.0), seconds=3.0) == ("given up", pytest.approx(moves + 3.0))


@pytest.mark.parametrize("moves", [0, 1, 100])
def test_what_moves_is_waited_for(moves: int):
    assert waited(Belt(moves=moves, seconds=moves + 2.9), seconds=3.0) == ("done", pytest.approx(moves + 2.9))


def test_an_error_is_raised_as_it_is():
    async def wait() -> None:
        async def fail() -> None:
            await asyncio.sleep(1.0)
            raise KeyError("of its own")

        with pytest.raises(KeyError, match="of its own"):
            await while_moving(fail(), lambda: 0.0, seconds=3.0)
        await asyncio.sleep(10.0)  # whatever was to look after it does nothing any more

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
