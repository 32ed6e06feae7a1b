"""The virtual clock of the schedules."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from .virtual_time import Deadlock, run


def test_a_day_of_sleep_takes_no_time_and_keeps_its_order():
    async def scene() -> list[str]:
        woken: list[str] = []

        async def sleep(hours: int) -> None:
            await asyncio.sleep(hours * 3600)
            woken.append(f"{hours} hours")

        await asyncio.gather(sleep(24), sleep(1), sleep(5))
        assert asyncio.get_running_loop().time() == pytest.approx(86_400)
        return woken

    assert run(scene()) == ["1 hours", "5 hours", "24 hours"]


def test_a_timeout_ends_an_endless_wait():
    async def scene() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(scene()) == pytest.approx(3600)


def test_work_for_threads_is_computed_at_once():
    async def scene() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(max, 3, 4)

    assert run(scene()) == 4


async def wait_for_nothing() -> None:
    await asyncio.Event().wait()


async def spin() -> None:
    while True:  # noqa: ASYNC110 - the loop is what is tested
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("stuck", "what"), [(wait_for_nothing, "no task can ever continue"), (spin, "time stands still")]
)
def test_a_hanging_task_is_an_error_that_names_it(stuck: Any, what: str):
    async def scene() -> None:
        await asyncio.sleep(7)
        await asyncio.gather(asyncio.create_task(stuck(), name="the culprit"))

    with pytest.raises(Deadlock, match=f"{what} at 7.000 s(.|\n)*the culprit"):
        run(scene())


def test_a_task_that_is_left_running_is_an_error():
    async def scene(work: Coroutine[Any, Any, None]) -> None:
        scene.left = asyncio.create_task(work, name="the one left")  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="the one left"):
        run(scene(asyncio.sleep(1)))
