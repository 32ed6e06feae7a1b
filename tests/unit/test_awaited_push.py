"""When a client carries the inputs of a pass that a server should have been pushed, and how a ring begins."""

from __future__ import annotations

import asyncio

import pytest

from shoal.client.swarm.broken_pairs import UNPUSHED_PONGS, AwaitedPush
from shoal.client.training.ring_turn import RingStart
from shoal.net.transport import SLOWEST_LINK
from shoal.protocol import Pong

from . import virtual_time

IDLE, WORKING = Pong(working=False, num_passes=0), Pong(working=True, num_passes=0)


def pongs_until_missing(push: AwaitedPush, *, every_seconds: float) -> int:
    """How many idle pongs say that the inputs are missing."""
    return next(number for number in range(1, 1000) if push.is_missing(IDLE, now=number * every_seconds))


def test_a_server_that_is_idle_after_the_one_before_has_answered_was_not_pushed_its_inputs() -> None:
    push = AwaitedPush(num_bytes=1024)
    assert not any(push.is_missing(IDLE, now=float(number)) for number in range(100))  # there is nothing to push yet
    push.is_due.set()
    assert not push.is_missing(WORKING, now=100.0)
    assert pongs_until_missing(push, every_seconds=0.1) == UNPUSHED_PONGS


def test_large_inputs_may_take_as_long_as_over_the_slowest_link() -> None:
    push = AwaitedPush(num_bytes=9 * SLOWEST_LINK)
    push.is_due.set()
    assert pongs_until_missing(push, every_seconds=0.5) == 1 + 9 / 0.5


def test_a_server_that_works_in_between_was_pushed_something() -> None:
    push = AwaitedPush(num_bytes=0)
    push.is_due.set()
    for now in range(UNPUSHED_PONGS - 1):
        assert not push.is_missing(IDLE, now=float(now))
    assert not push.is_missing(WORKING, now=9.0)
    assert not push.is_missing(IDLE, now=10.0)


def test_no_server_of_a_ring_is_asked_before_all_can_be() -> None:
    async def scene() -> None:
        start, clock = RingStart(3), asyncio.get_running_loop().time

        async def ask(seconds: float) -> float:
            await asyncio.sleep(seconds)
            await start.join()
            return round(clock(), 3)

        tasks = [asyncio.create_task(ask(seconds)) for seconds in (0.0, 2.0, 1.0)]
        await start.wait(tasks)
        assert await asyncio.gather(*tasks) == [2.0, 2.0, 2.0]

    virtual_time.run(scene())


def test_a_server_that_cannot_be_asked_ends_the_wait_of_the_others() -> None:
    async def scene() -> None:
        start = RingStart(2)

        async def fail() -> None:
            await asyncio.sleep(1.0)
            raise ConnectionError("gone")

        tasks = [asyncio.create_task(start.join()), asyncio.create_task(fail())]
        with pytest.raises(ConnectionError, match="gone"):
            await start.wait(tasks)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    virtual_time.run(scene())
