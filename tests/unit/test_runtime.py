from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref

import pytest

from shoal import UserError
from shoal.client.runtime import Runtime


async def answer() -> int:
    return 42


def test_what_belongs_to_a_runtime_is_closed_when_nobody_holds_it_any_more():
    closed: list[str] = []
    runtime = Runtime()
    thread = runtime._thread
    runtime.resources.callback(closed.append, "network")
    assert runtime.run(answer()) == 42
    del runtime
    gc.collect()
    assert closed == ["network"]
    assert not thread.is_alive()


def test_a_runtime_may_be_forgotten_on_its_own_thread():
    runtime = Runtime()
    thread, held = runtime._thread, [runtime]
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
    runtime._thread.join(20)
    assert not runtime._thread.is_alive()
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
            runtime._closing()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert runtime.run(answer()) == 42
    runtime.close()


def test_what_runs_is_ended_before_the_network_that_it_uses():
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
