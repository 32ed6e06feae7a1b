"""One stream of one client, from its first message to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from shoal.net import codec
from shoal.net.transport import Stream, StreamBroken
from shoal.protocol import (
    HEARTBEAT_SECONDS,
    Backward,
    Close,
    Encoding,
    Failure,
    Forward,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    ProtocolViolation,
    Result,
    Step,
    Working,
)
from shoal.server.engine import Engine
from shoal.server.refusal import Refused, rejected
from shoal.server.session import Session

log = logging.getLogger(__name__)
T = TypeVar("T")

FAREWELL_SECONDS = 2.0
"""How long a client may take to hear why its stream ends."""


class Handler:
    """Answers one message after another. A failure is told to the client and ends its stream, and nothing else."""

    def __init__(self, engine: Engine, *, idle_seconds: float) -> None:
        self._engine = engine
        self._idle_seconds = idle_seconds
        self._conversations: set[asyncio.Task[Any]] = set()
        self._leaving = False

    async def leave(self) -> None:
        """Tell every client that the server is going away, now and from now on."""
        self._leaving = True
        conversations = self._conversations - {asyncio.current_task()}
        for conversation in conversations:
            conversation.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)

    async def __call__(self, stream: Stream) -> None:
        conversation = asyncio.current_task()
        assert conversation is not None
        self._conversations.add(conversation)
        try:
            if self._leaving:
                raise asyncio.CancelledError
            await self._converse(stream)
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            await _fail(stream, Failure(code="leaving", reason="this server is going away"))
        except StreamBroken:
            log.debug("%s hung up", stream.peer)
        except TimeoutError:
            log.debug("%s said or read nothing for %.0f s", stream.peer, self._idle_seconds)
        except ProtocolViolation as violation:
            await _fail(stream, Failure(code="rejected", reason=str(violation)))
        except Refused as refused:
            await _fail(stream, refused.failure)
        except Exception as error:
            # Whatever a model's code may raise: this client is told, the others go on.
            log.exception("a request of %s failed", stream.peer)
            await _fail(stream, Failure(code="broken", reason=f"{type(error).__name__} while computing"))
        finally:
            self._conversations.discard(conversation)
            await stream.close()

    async def _converse(self, stream: Stream) -> None:
        session: Session | None = None
        try:
            while True:
                async with asyncio.timeout(self._idle_seconds):
                    message, tensors = await codec.receive(stream)
                match message:
                    case Ping():
                        await self._say(stream, Pong())
                    case Close():
                        return
                    case Open() if session is None:
                        session, known = self._engine.open(message, tensors)
                        outputs: codec.Tensors = {} if known is None else {"hidden": known}
                        await self._say(stream, Opened(num_tokens=session.num_tokens), outputs, message.encoding)
                    case Step() if session is not None:
                        answer = await self._alive(stream, self._engine.step(session, message, tensors))
                        encoding = message.encoding_of("hidden") if message.logits is None else "raw"
                        await self._say(stream, Result(), answer, encoding)
                    case Forward():
                        hidden = await self._alive(stream, self._engine.forward(message, tensors))
                        await self._say(stream, Result(), {"hidden": hidden}, message.encoding_of("hidden"))
                    case Backward():
                        grad = await self._alive(stream, self._engine.backward(message, tensors))
                        await self._say(stream, Result(), {"grad": grad}, message.encoding_of("hidden"))
                    case _:
                        raise rejected(f"a message of kind {message.kind!r} makes no sense here")
        finally:
            if session is not None:
                self._engine.close(session)

    async def _alive(self, stream: Stream, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, telling the client at every heartbeat that it is on its way.

        Raises `StreamBroken` when the client is gone; the work is then dropped, if it has not begun.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=HEARTBEAT_SECONDS))[0]:
                await self._say(stream, Working())
            return task.result()
        finally:
            task.cancel()

    async def _say(
        self, stream: Stream, message: Message, tensors: codec.Tensors | None = None, encoding: Encoding = "raw"
    ) -> None:
        """Raises `TimeoutError` for a client that does not read: it would keep its room for ever."""
        async with asyncio.timeout(self._idle_seconds):
            await codec.send(stream, message, tensors, encoding)


async def _fail(stream: Stream, failure: Failure) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await codec.send(stream, failure)
