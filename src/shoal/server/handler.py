"""One stream of one client, from its first message to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

import torch

from shoal.net import codec
from shoal.net.transport import Stream, StreamBroken
from shoal.protocol import (
    Backward,
    Close,
    Encoding,
    Failure,
    Forward,
    Message,
    Open,
    Ping,
    Pong,
    ProtocolViolation,
    Result,
    Step,
    TensorName,
)
from shoal.server.conversation import Conversation
from shoal.server.engine import Engine
from shoal.server.links import Links
from shoal.server.refusal import Refused, rejected

log = logging.getLogger(__name__)

FAREWELL_SECONDS = 2.0
"""How long a client may take to hear why its stream ends."""
LEAVING = Failure(code="leaving", reason="this server is going away")

Arrived = tuple[Message, dict[TensorName, torch.Tensor]]


class Handler:
    """Answers one message after another. A failure is told to the client and ends its stream, and nothing else."""

    def __init__(self, engine: Engine, links: Links, *, idle_seconds: float) -> None:
        self._engine = engine
        self._links = links
        self._idle_seconds = idle_seconds
        self._sessions: set[Conversation] = set()
        self._ended = asyncio.Event()
        self._leaves_at: float | None = None
        self._conversations: set[asyncio.Task[Any]] = set()
        self._leaving = False

    async def drain(self, seconds: float) -> None:
        """Take no new sessions, ask the clients of the others to take them elsewhere, and wait so long for that."""
        self._leaves_at = asyncio.get_running_loop().time() + seconds
        if self._sessions:
            log.warning("%d sessions have %.0f s to go on elsewhere", len(self._sessions), seconds)
        async with asyncio.TaskGroup() as group:
            for session in self._sessions:
                group.create_task(_told(session, seconds))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._leaves_at):
                while self._sessions:
                    self._ended.clear()
                    await self._ended.wait()

    async def leave(self) -> None:
        """Tell every client that the server is gone, now and from now on."""
        self._leaving = True
        conversations = self._conversations - {asyncio.current_task()}
        for conversation in conversations:
            conversation.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        await self._links.close()

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
            await _fail(stream, LEAVING)
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
        arrived: Arrived | None = None
        while True:
            async with asyncio.timeout(self._idle_seconds):
                message, tensors = arrived or await codec.receive(stream)
            arrived = None
            match message:
                case Ping():
                    await self._say(stream, self._pong(working=False))
                case Close():
                    return
                case Open():
                    await self._hold_session(stream, message, tensors)
                    return
                case Step() if message.link is not None:
                    await self._links.listen(stream, message, tensors, idle_seconds=self._idle_seconds)
                    return
                case Forward():
                    hidden, arrived = await self._alive(stream, self._engine.forward(message, tensors))
                    await self._say(stream, Result(), {"hidden": hidden}, message.encoding_of("hidden"))
                case Backward():
                    grad, arrived = await self._alive(stream, self._engine.backward(message, tensors))
                    await self._say(stream, Result(), {"grad": grad}, message.encoding_of("hidden"))
                case _:
                    raise rejected(f"a message of kind {message.kind!r} makes no sense here")

    async def _hold_session(self, stream: Stream, request: Open, tensors: codec.Tensors) -> None:
        if self._leaves_at is not None:
            raise Refused(LEAVING)
        conversation = Conversation(stream, self._engine, self._links, idle_seconds=self._idle_seconds)
        self._sessions.add(conversation)
        try:
            await conversation.run(request, tensors)
        finally:
            self._sessions.discard(conversation)
            self._ended.set()

    async def _alive(
        self, stream: Stream, work: Coroutine[Any, Any, torch.Tensor]
    ) -> tuple[torch.Tensor, Arrived | None]:
        """The outcome of `work`, and what came after it was asked for, other than pings, which are answered.

        Raises `StreamBroken` when the client is gone; the work is then dropped.
        """
        computing = asyncio.create_task(work)
        hearing = asyncio.create_task(codec.receive(stream))
        arrived: Arrived | None = None
        try:
            while not computing.done():
                waiting = {computing} if arrived else {computing, hearing}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if arrived is None and hearing.done():
                    arrived = hearing.result()
                    if isinstance(arrived[0], Ping):
                        await self._say(stream, self._pong(working=True))
                        arrived = None
                        hearing = asyncio.create_task(codec.receive(stream))
            return computing.result(), arrived
        finally:
            computing.cancel()
            hearing.cancel()
            await asyncio.gather(computing, hearing, return_exceptions=True)

    def _pong(self, *, working: bool) -> Pong:
        return Pong(working=working, num_passes=self._engine.num_passes)

    async def _say(
        self, stream: Stream, message: Message, tensors: codec.Tensors | None = None, encoding: Encoding = "raw"
    ) -> None:
        """Raises `TimeoutError` for a client that does not read: it would keep its room for ever."""
        async with asyncio.timeout(self._idle_seconds):
            await codec.send(stream, message, tensors, encoding)


async def _told(session: Conversation, seconds: float) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await session.leave(seconds)


async def _fail(stream: Stream, failure: Failure) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await codec.send(stream, failure)
