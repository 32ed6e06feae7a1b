"""The tokens of one generation, as its caller takes them: in an event loop, or in a thread that waits."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from shoal.client.generation.generation import Token
from shoal.client.generation.speculating import Speculation
from shoal.client.inference_session import InferenceSession
from shoal.client.runtime import Runtime
from shoal.events import TextDoubtful


class Mailbox:
    """Tokens on their way from the engine to the caller; what comes last says how it ended.

    The engine puts, one reader takes, each on a thread of its own. The reader waits only while nothing is there.
    """

    def __init__(self) -> None:
        self.reader_is_gone = False
        """Whether the event loop in which the reader waited was closed meanwhile: nothing is taken any more."""
        self._items: deque[Token | BaseException | None] = deque()
        self._wake: Callable[[], object] | None = None
        self._lock = threading.Lock()

    def put(self, item: Token | BaseException | None) -> None:
        """A token; an error; or `None`, after the last token."""
        with self._lock:
            self._items.append(item)
            wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # its event loop is closed
                self.reader_is_gone = True

    def take(self, wake: Callable[[], object]) -> tuple[Token | BaseException | None] | None:
        """The next item, in a tuple. If there is none yet, `None`: `wake` is called when there is."""
        with self._lock:
            if self._items:
                return (self._items.popleft(),)
            self._wake = wake
            return None


class TokenStream:
    """The tokens of a text, to be iterated over with `for` or `async for`; close it to stop the generation.

    It closes at the end of its `with` or `async with` block, and when it is forgotten. Raises what `generate()` raises.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        runtime: Runtime,
        session: InferenceSession,
        cancel: Callable[[], Coroutine[Any, Any, None]],
        speculation: Speculation | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._session = session
        self._speculation = speculation
        self._runtime = runtime
        self._cancel = cancel
        self._closing = weakref.finalize(self, lambda: runtime.start(cancel()))
        self._closing.atexit = False
        self._ended = False

    @property
    def num_cached(self) -> int:
        """How many tokens of the prompt the servers had in their caches. It is known from the first token on."""
        return self._session.num_cached

    @property
    def doubtful(self) -> tuple[TextDoubtful, ...]:
        """The tokens of its session that a server may have spoilt, as far as audits have found out (docs/trust.md)."""
        return self._session.doubtful

    @property
    def num_guessed(self) -> int:
        """How many tokens were guessed ahead until now (docs/speculation.md)."""
        return 0 if self._speculation is None else self._speculation.num_guessed

    @property
    def num_right(self) -> int:
        """How many of these guesses were right: each saved a step."""
        return 0 if self._speculation is None else self._speculation.num_right

    def close(self) -> None:
        """Stop, and let the servers forget the session. A session of the caller's can then be used again.

        May be called twice.
        """
        self._ended = True
        if self._closing.detach() is not None and self._runtime.usable:
            self._runtime.run(self._cancel())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        while not self._ended:
            came = threading.Event()
            if (item := self._mailbox.take(came.set)) is None:
                try:
                    came.wait()
                except BaseException:  # Ctrl-C
                    self.close()
                    raise
            elif (token := self._opened(item)) is not None:
                return token
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        loop = asyncio.get_running_loop()
        while not self._ended:
            came = asyncio.Event()
            if (item := self._mailbox.take(lambda came=came: loop.call_soon_threadsafe(came.set))) is None:  # type: ignore[misc]
                try:
                    await came.wait()
                except BaseException:  # cancelled: without waiting for the servers
                    self._ended = True
                    self._closing()
                    raise
            elif (token := self._opened(item)) is not None:
                return token
        raise StopAsyncIteration

    def _opened(self, item: tuple[Token | BaseException | None]) -> Token | None:
        """The token in an item. Raises the error in it; `None` at the end."""
        (found,) = item
        if isinstance(found, Token):
            return found
        self.close()
        if found is not None:
            raise found
        return None
