"""Where the client's network lives: an event loop on a thread of its own.

`generate()` is synchronous and may be called from several threads; the streams to the servers live longer than any one
call. So they belong to one loop, which never computes and is therefore always there to answer. Model, blocks and
sessions all hold it, and the last one that goes closes it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar

from shoal.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 10.0
"""A network that takes longer to say goodbye is left without."""
SESSIONS_SECONDS = 2.0
"""The same of all sessions."""


class Closable(Protocol):
    async def close(self) -> None: ...


class Runtime:
    """An event loop on a daemon thread, and `resources` that are closed with it, after `sessions` and all other work.

    In this order, or what still runs would take the end of our own network for the loss of the servers.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.resources = contextlib.AsyncExitStack()
        self.sessions: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._works: set[concurrent.futures.Future[Any]] = set()
        self._thread = threading.Thread(target=_serve, args=(self.loop,), name="shoal-client", daemon=True)
        self._thread.start()
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.RLock()  # what is started after `close` would never end
        leave = partial(_leave, self._works, self.sessions, self.resources)
        self._closing = weakref.finalize(self, _close, self._process, self.loop, self._thread, leave)

    @property
    def usable(self) -> bool:
        """Whether the loop is there: not closed, and not left behind in the process that forked this one."""
        return not self._closed and os.getpid() == self._process

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine on the loop. Ctrl-C, or whatever ends the wait, cancels it.

        Raises `UserError` where the loop is not, or no more.
        """
        future = self._submit(work)
        if future is None:
            if os.getpid() != self._process:
                raise UserError("this model was opened before a fork", hint="open the model after the fork")
            raise UserError("this model is closed")
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise UserError("closed while it was in use") from None
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine that nobody waits for, such as the closing of a forgotten session."""
        self._submit(work)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T] | None:
        if os.getpid() == self._process:
            with self._lock:
                if not self._closed and not self.loop.is_closed():
                    future = asyncio.run_coroutine_threadsafe(work, self.loop)
                    self._works.add(future)
                    future.add_done_callback(self._works.discard)
                    return future
        work.close()
        return None

    def close(self) -> None:
        """Cancel what is still running, close the resources and end the thread. May be called twice."""
        if self.usable:
            with self._lock:
                self._closed = True
            self._closing()


class Hold:
    """A model's part in a runtime that it shares with its copies: the last of them to be closed closes it.

    A copy that is forgotten needs not be closed.
    """

    def __init__(self, runtime: Runtime, holders: weakref.WeakSet[Hold] | None = None) -> None:
        self._runtime = runtime
        self._holders = weakref.WeakSet[Hold]() if holders is None else holders
        self._closed = False
        self._holders.add(self)

    @property
    def runtime(self) -> Runtime:
        """Raises `UserError` once it is closed, though others may still use it."""
        if self._closed:
            raise UserError("this model is closed")
        return self._runtime

    def another(self) -> Hold:
        """For a copy of the model. Raises `UserError` once it is closed."""
        return Hold(self.runtime, self._holders)

    def close(self) -> None:
        """May be called twice."""
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
    process: int,
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    leave: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    if os.getpid() != process:
        return
    leaving = asyncio.run_coroutine_threadsafe(leave(), loop)
    leaving.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if threading.current_thread() is thread:
        return  # garbage is collected on any thread; this one cannot wait for itself
    try:
        leaving.result(CLOSE_SECONDS)
    except TimeoutError:
        log.warning("the network did not close within %g s", CLOSE_SECONDS)
    else:
        thread.join(CLOSE_SECONDS)


async def close_in_order(sessions: Iterable[Closable], resources: contextlib.AsyncExitStack) -> None:
    """Close the sessions, unless that takes long, and then what they use."""
    try:
        async with asyncio.timeout(SESSIONS_SECONDS):
            await asyncio.gather(*(session.close() for session in list(sessions)), return_exceptions=True)
    except TimeoutError:
        log.debug("the sessions did not close within %g s", SESSIONS_SECONDS)
    finally:
        await resources.aclose()


async def _leave(
    works: Iterable[concurrent.futures.Future[Any]],
    sessions: Iterable[Closable],
    resources: contextlib.AsyncExitStack,
) -> None:
    try:
        for work in list(works):
            work.cancel()
        await close_in_order(sessions, resources)
    finally:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
