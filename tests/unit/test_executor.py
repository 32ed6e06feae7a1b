from __future__ import annotations

import asyncio
import threading

import pytest

from shoal.server.executor import Abandoned, Executor

pytestmark = pytest.mark.anyio


async def test_functions_run_one_after_another_in_the_order_in_which_they_were_asked_for() -> None:
    executor, busy, done = Executor(), threading.Event(), list[int]()
    try:
        tasks = [asyncio.create_task(executor.run(busy.wait))]
        tasks += [asyncio.create_task(executor.run(lambda number=number: done.append(number))) for number in range(20)]
        await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(*tasks)
    finally:
        busy.set()
        executor.close()
    assert done == list(range(20))


async def test_all_functions_run_on_one_thread_which_is_not_the_event_loop_s() -> None:
    executor = Executor()
    try:
        threads = {await executor.run(threading.get_ident) for _ in range(5)}
    finally:
        executor.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_function_whose_caller_is_gone_never_runs() -> None:
    executor, busy, ran = Executor(), threading.Event(), list[str]()
    try:
        first = asyncio.create_task(executor.run(busy.wait))
        second = asyncio.create_task(executor.run(lambda: ran.append("second")))
        third = asyncio.create_task(executor.run(lambda: ran.append("third")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        busy.set()
        await asyncio.gather(first, third)
    finally:
        busy.set()
        executor.close()
    assert ran == ["third"]


async def test_what_a_function_raises_is_raised_to_its_caller_and_the_thread_goes_on() -> None:
    executor = Executor()
    try:
        with pytest.raises(ZeroDivisionError):
            await executor.run(lambda: 1 // 0)
        assert await executor.run(lambda: 7) == 7
    finally:
        executor.close()


async def test_an_abandoned_thread_ends_at_its_next_check_and_is_not_waited_for() -> None:
    executor, started, go_on = Executor(), threading.Event(), threading.Event()
    ended, checked = threading.Event(), list[str]()

    def load() -> None:
        started.set()
        go_on.wait()
        try:
            executor.check()
            checked.append("goes on")
        except Abandoned:
            checked.append("ends")

    work = asyncio.create_task(executor.run(load))
    await asyncio.to_thread(started.wait)
    work.cancel()
    executor.abandon(ended.set)  # returns, although the thread is busy
    go_on.set()
    assert ended.wait(60)
    assert checked == ["ends"]
