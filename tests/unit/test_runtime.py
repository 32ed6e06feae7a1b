from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref

import pytest

from shoal import UserError
from shoal.client.runtime import LoopThread, Runtime


async def answer() -> int:
    return 42


def test_a_runtime_that_is_garbage_collected_closes_its_resources():
    closed: list[str] = []
    runtime = Runtime()
    thread = runtime.thread
    runtime.resources.callback(closed.append, "network")
    assert runtime.run(answer()) == 42
    del runtime
    gc.collect()
    assert closed == ["network"]
    assert not thread.is_alive()


def test_a_runtime_may_be_garbage_collected_on_its_own_thread():
    runtime = Runtime()
    thread, held = runtime.thread, [runtime]
    gone = weakref.ref(runtime)
    loop = runtime.loop
    del runtime
    loop.call_soon_threadsafe(held.clear)
    thread.join(20)
    assert not thread.is_alive()
    assert gone() is None


def test_the_thread_ends_even_if_the_network_cannot_be_closed():
    def fail() -> None:
        raise OSError("the network is gone")

    runtime = Runtime()
    runtime.resources.callback(fail)
    with pytest.raises(OSError, match="the network is gone"):
        runtime.close()
    runtime.thread.join(20)
    assert not runtime.thread.is_alive()
    runtime.close()


def test_work_that_is_running_when_the_runtime_is_closed_ends_with_an_error():
    runtime = Runtime()
    running = threading.Event()

    async def work() -> None:
        running.set()
        await asyncio.sleep(3600)

    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(UserError, match="closed while it was in use") as raised:
            runtime.run(work())
        errors.append(raised.value)

    thread = threading.Thread(target=wait)
    thread.start()
    running.wait()
    runtime.close()
    thread.join(20)
    assert errors
    with pytest.raises(UserError, match="this model is closed"):
        runtime.run(answer())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads
def test_a_forked_process_is_told_to_open_its_own():
    runtime = Runtime()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            runtime.run(answer())
        except UserError:
            runtime.close()
            del runtime
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert runtime.run(answer()) == 42
    runtime.close()


def test_running_calls_end_before_the_network_that_they_use():
    runtime, running, ends = Runtime(), threading.Event(), list[str]()

    class Session:
        async def close(self) -> None:
            await asyncio.sleep(0)
            ends.append("session")

    async def work() -> None:
        try:
            running.set()
            await asyncio.sleep(3600)
        finally:
            ends.append("work")

    async def close() -> None:
        ends.append("network")

    session = Session()
    runtime.sessions.add(session)
    runtime.resources.push_async_callback(close)
    runtime.start(work())
    running.wait()
    runtime.close()
    assert ends == ["work", "session", "network"]


def sharing(num_runtimes: int) -> tuple[LoopThread, list[Runtime]]:
    """Runtimes on one thread."""
    thread = LoopThread()
    assert all(thread.acquire() for _ in range(num_runtimes))
    return thread, [Runtime(thread) for _ in range(num_runtimes)]


def test_runtimes_on_one_thread_close_what_is_theirs_and_the_last_one_closes_what_they_share():
    closed: list[str] = []
    thread, (first, second) = sharing(2)
    thread.resources.callback(closed.append, "node")
    first.resources.callback(closed.append, "first")
    second.resources.callback(closed.append, "second")
    first.close()
    assert closed == ["first"]
    with pytest.raises(UserError, match="this model is closed"):
        first.run(answer())
    assert second.run(answer()) == 42
    second.close()
    assert closed == ["first", "second", "node"]
    assert not thread.thread.is_alive()


def test_a_runtime_that_is_closed_ends_its_own_calls_only():
    _, (first, second) = sharing(2)
    running, go_on = threading.Barrier(3), asyncio.Event()
    results: dict[str, object] = {}

    async def work() -> str:
        await asyncio.to_thread(running.wait)
        await go_on.wait()
        return "done"

    def call(name: str, runtime: Runtime) -> None:
        try:
            results[name] = runtime.run(work())
        except UserError as error:
            results[name] = error

    threads = [threading.Thread(target=call, args=each) for each in (("first", first), ("second", second))]
    for each in threads:
        each.start()
    running.wait()
    first.close()
    second.loop.call_soon_threadsafe(go_on.set)
    for each in threads:
        each.join(20)
    assert isinstance(results["first"], UserError)
    assert results["second"] == "done"
    second.close()


def test_a_forgotten_runtime_does_not_keep_the_shared_thread():
    thread, runtimes = sharing(2)
    runtimes.pop().close()
    assert thread.thread.is_alive()
    runtimes.clear()
    gc.collect()
    thread.thread.join(20)
    assert not thread.thread.is_alive()
    assert not thread.acquire()
