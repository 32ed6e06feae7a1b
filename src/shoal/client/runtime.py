"""Where a client's network work runs: an event loop on a thread of its own, which all models of a process may share.

`generate()` is synchronous and may be called from several threads, and the streams to the servers outlive any one
call. So the streams belong to one event loop, which computes nothing and can therefore always answer a ping.

    LoopThread   the event loop, its thread, and what all models on it use: the network node
    Runtime      one model's work on it: its calls, sessions and connections
    Hold         one copy's claim on that: copies of a model share a runtime

Each level is closed with the last one above it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from shoal.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 10.0
"""How long the caller waits for a runtime to close. The thread is a daemon, so the process can end without it."""
SESSIONS_SECONDS = 2.0
"""How long all sessions together may take to tell their servers that they end."""


class Closable(Protocol):
    async def close(self) -> None:
        """End it."""


class LoopThread:
    """An event loop on a daemon thread, with `resources` that are closed when the last runtime on it is.

    It starts with the first runtime (`acquire`) and ends with the last (`release`).
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.resources = contextlib.AsyncExitStack()
        self.thread = threading.Thread(target=_serve, args=(self.loop,), name="shoal-client", daemon=True)
        self._process = os.getpid()
        self._num_users = 0
        self._has_ended = False
        self._lock = threading.Lock()

    @property
    def is_ours(self) -> bool:
        """Whether this process started it: a forked child has the object, but not the thread."""
        return os.getpid() == self._process

    def acquire(self) -> bool:
        """Count one more runtime. Returns whether that was in time: a thread that has ended does not start again."""
        with self._lock:
            if self._has_ended or not self.is_ours:
                return False
            if not self._num_users:
                self.thread.start()
            self._num_users += 1
            return True

    async def release(self) -> None:
        """Count one runtime less. The last one closes the resources, cancels the tasks that are left, and stops."""
        with self._lock:
            self._num_users -= 1
            self._has_ended = not self._num_users
        if not self._has_ended:
            return
        try:
            await self.resources.aclose()
        finally:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop_if_ended(self) -> None:
        """Let the thread end, once nothing uses it."""
        if self._has_ended:
            self.loop.call_soon_threadsafe(self.loop.stop)

    def join(self) -> None:
        """Wait for the thread, if it is about to end and is not the caller's own."""
        if self._has_ended:
            self.thread.join(CLOSE_SECONDS)


class Runtime:
    """One model's work on an event loop: on a thread that was acquired for it, or else on one of its own.

    When it is closed, or forgotten, it cancels its calls, closes its `sessions`, and then its `resources`. In another
    order, the end of our own connections would look like the loss of the servers.
    """

    def __init__(self, loop_thread: LoopThread | None = None) -> None:
        if loop_thread is None:
            loop_thread = LoopThread()
            loop_thread.acquire()
        self.loop_thread = loop_thread
        self.resources = contextlib.AsyncExitStack()
        self.sessions: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._lock = threading.RLock()  # nothing is submitted after `close`: it would never end
        self._closing = weakref.finalize(self, _close, self.loop_thread, self._calls, self.sessions, self.resources)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which the model's network work runs."""
        return self.loop_thread.loop

    @property
    def thread(self) -> threading.Thread:
        """The thread that the loop runs on."""
        return self.loop_thread.thread

    @property
    def usable(self) -> bool:
        """Whether calls can be run: it is not closed, and this process is the one that opened it."""
        return not self._closed and self.loop_thread.is_ours

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result. Ctrl-C, or any end of the wait, cancels it.

        Raises `UserError` when the runtime is closed, or was opened before a fork.
        """
        future = self._submit(work)
        if future is None:
            if not self.loop_thread.is_ours:
                raise UserError("this model was opened before a fork", hint="open the model after the fork")
            raise UserError("this model is closed")
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise UserError("the model was closed while it was in use") from None
        except BaseException:
            future.cancel()
            raise

    async def awaited(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for callers in another event loop, who do not block it. Raises `UserError` as `run` does."""
        future = self._submit(work)
        if future is None:
            raise UserError("this model is closed")
        return await asyncio.wrap_future(future)

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine without waiting for it, such as the closing of a forgotten session."""
        self._submit(work)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T] | None:
        if self.loop_thread.is_ours:
            with self._lock:
                if not self._closed and not self.loop.is_closed():
                    future = asyncio.run_coroutine_threadsafe(work, self.loop)
                    self._calls.add(future)
                    future.add_done_callback(self._calls.discard)
                    return future
        work.close()
        return None

    def close(self) -> None:
        """Cancel the running calls and close sessions and resources. May be called twice.

        Raises what a resource raises as it is closed.
        """
        if self.usable:
            with self._lock:
                self._closed = True
            self._closing()


class Hold:
    """A model's part in the runtime that it shares with its copies: the last of them to be closed closes it.

    A copy that is garbage-collected needs no closing.
    """

    def __init__(self, runtime: Runtime, holders: weakref.WeakSet[Hold] | None = None) -> None:
        self._runtime = runtime
        self._holders = weakref.WeakSet[Hold]() if holders is None else holders
        self._closed = False
        self._holders.add(self)

    @property
    def runtime(self) -> Runtime:
        """The runtime. Raises `UserError` once this hold is closed, even while copies of the model use it."""
        if self._closed:
            raise UserError("this model is closed")
        return self._runtime

    def another(self) -> Hold:
        """The hold of a copy of the model. Raises `UserError` once this one is closed."""
        return Hold(self.runtime, self._holders)

    def close(self) -> None:
        """Give it up. May be called twice."""
        self._closed = True
        self._holders.discard(self)
        if not self._holders:
            self._runtime.close()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _close(
    loop_thread: LoopThread,
    calls: Iterable[concurrent.futures.Future[Any]],
    sessions: Iterable[Closable],
    resources: contextlib.AsyncExitStack,
) -> None:
    if not loop_thread.is_ours:
        return
    leaving = asyncio.run_coroutine_threadsafe(_leave(loop_thread, calls, sessions, resources), loop_thread.loop)
    leaving.add_done_callback(lambda _: loop_thread.stop_if_ended())
    if threading.current_thread() is loop_thread.thread:
        return  # garbage is collected on any thread, and this one cannot wait for itself
    try:
        leaving.result(CLOSE_SECONDS)
    except TimeoutError:
        log.warning("the network did not close within %g s", CLOSE_SECONDS)
    else:
        loop_thread.join()


async def close_in_order(sessions: Iterable[Closable], resources: contextlib.AsyncExitStack) -> None:
    """Close the sessions, for at most `SESSIONS_SECONDS`, and then the resources that they use."""
    try:
        async with asyncio.timeout(SESSIONS_SECONDS):
            await asyncio.gather(*(session.close() for session in list(sessions)), return_exceptions=True)
    except TimeoutError:
        log.debug("the sessions did not close within %g s", SESSIONS_SECONDS)
    finally:
        await resources.aclose()


async def _leave(
    loop_thread: LoopThread,
    calls: Iterable[concurrent.futures.Future[Any]],
    sessions: Iterable[Closable],
    resources: contextlib.AsyncExitStack,
) -> None:
    try:
        for call in list(calls):
            call.cancel()
        await close_in_order(sessions, resources)
    finally:
        await loop_thread.release()
