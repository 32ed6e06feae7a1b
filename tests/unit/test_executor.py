from __future__ import annotations

import asyncio
import threading

import pytest

from shoal.server.executor import Executor, Priority

pytestmark = pytest.mark.anyio


async def order_of(*jobs: tuple[float, str, Priority]) -> list[str]:
    """The order in which jobs run that arrive at these times while the thread is busy."""
    now, done, busy = 0.0, list[str](), threading.Event()
    executor = Executor(clock=lambda: now)
    try:
        tasks = [asyncio.create_task(executor.run(Priority.DECODE, busy.wait))]
        for now, name, priority in jobs:  # noqa: B007 - the clock reads it
            tasks.append(asyncio.create_task(executor.run(priority, lambda name=name: done.append(name))))
            await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(*tasks)
    finally:
        busy.set()
        executor.close()
    return done


async def test_decoding_goes_before_a_prefill_and_both_before_training() -> None:
    jobs = [(0.0, "train", Priority.TRAIN), (0.01, "prefill", Priority.PREFILL), (0.02, "decode", Priority.DECODE)]
    assert await order_of(*jobs) == ["decode", "prefill", "train"]


async def test_nobody_waits_for_ever_behind_more_urgent_jobs() -> None:
    steps = [(0.06 * index, f"decode {index}", Priority.DECODE) for index in range(1, 30)]
    order = await order_of((0.0, "train", Priority.TRAIN), (0.0, "prefill", Priority.PREFILL), *steps)
    assert order.index("prefill") == 1  # behind what arrived within 0.1 s
    assert order.index("train") == 17  # and within 1 s


async def test_a_job_whose_caller_is_gone_never_runs() -> None:
    executor, busy, ran = Executor(), threading.Event(), list[str]()
    try:
        first = asyncio.create_task(executor.run(Priority.DECODE, busy.wait))
        second = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("second")))
        third = asyncio.create_task(executor.run(Priority.DECODE, lambda: ran.append("third")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(first, third)
    finally:
        busy.set()
        executor.close()
    assert ran == ["third"]


async def test_what_a_job_raises_is_raised_to_its_caller_and_the_thread_goes_on() -> None:
    executor = Executor()
    try:
        with pytest.raises(ZeroDivisionError):
            await executor.run(Priority.TRAIN, lambda: 1 // 0)
        assert await executor.run(Priority.TRAIN, lambda: 7) == 7
    finally:
        executor.close()
