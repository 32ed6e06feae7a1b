"""One stream to one server: a question, an answer, and every way that an answer can fail to come, by name."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

import torch

from shoal.errors import PeerError, RequestRejected, ServerBusy, ServerLost
from shoal.net import codec
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.protocol import Close, Failure, Message, ProtocolViolation, Result, TensorName, Working
from shoal.spans import ServerInfo

OPEN_SECONDS = 10.0
NEVER = 3600.0


class CannotRewind(PeerError):
    """The server cannot take its session back; it has to be sent everything again."""


class Connection:
    """Questions to one server, one at a time. After any error it is closed and of no more use."""

    def __init__(self, stream: Stream, peer: str, *, silence_seconds: float) -> None:
        self._stream = stream
        self._peer = peer
        self._silence_seconds = silence_seconds

    @classmethod
    async def open(cls, transport: Transport, server: ServerInfo, *, silence_seconds: float) -> Self:
        """Connect. Raises `ServerLost`."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                stream = await transport.open(server.peer, server.addresses)
        except (StreamBroken, TimeoutError) as error:
            raise ServerLost(f"{server.peer} cannot be reached: {error}", peer=server.peer) from None
        return cls(stream, server.peer, silence_seconds=silence_seconds)

    async def compute(
        self, message: Message, tensors: codec.Tensors, *, answer: TensorName, shape: torch.Size
    ) -> torch.Tensor:
        """Ask for a tensor of a known shape. Raises `PeerError`s."""
        _, answered = await self.ask(message, tensors, expect=Result)
        result = answered.get(answer)
        dtype = tensors["hidden"].dtype
        if result is None or result.shape != shape or result.dtype != dtype:
            await self.close()
            raise ServerLost(f"{self._peer} answered something else than was asked", peer=self._peer)
        return result

    async def ask(
        self, message: Message, tensors: codec.Tensors | None = None, *, expect: type[Message]
    ) -> tuple[Message, codec.Tensors]:
        """Send a message and wait for its answer, however long the server says that it is working on it."""
        try:
            await codec.send(self._stream, message, tensors)
            while True:
                async with asyncio.timeout(self._silence_seconds):
                    reply, answered = await codec.receive(self._stream)
                if isinstance(reply, expect):
                    return reply, answered
                if not isinstance(reply, Working):
                    raise self._error(reply)
        except BaseException as error:
            await self.close(goodbye=False)
            if isinstance(error, StreamBroken | TimeoutError | ProtocolViolation):
                what = f"said nothing for {self._silence_seconds:g} s" if isinstance(error, TimeoutError) else error
                raise ServerLost(f"{self._peer} is lost: {what}", peer=self._peer) from None
            raise

    def _error(self, reply: Message) -> PeerError:
        peer = self._peer
        if not isinstance(reply, Failure):
            return ServerLost(f"{peer} answered with {reply.kind!r}, which nobody asked for", peer=peer)
        match reply.code:
            case "busy":
                return ServerBusy(f"{peer} is busy: {reply.reason}", peer=peer, retry_after=reply.retry_after or 1.0)
            case "misrouted":
                return ServerBusy(f"{peer} cannot do this: {reply.reason}", peer=peer, retry_after=NEVER)
            case "rejected":
                return RequestRejected(f"{peer} rejects this: {reply.reason}", peer=peer)
            case "rewind":
                return CannotRewind(reply.reason, peer=peer)
            case _:
                return ServerLost(f"{peer} gave up: {reply.reason}", peer=peer)

    async def close(self, *, goodbye: bool = True) -> None:
        """Release the stream, telling the server if it may still be listening. May be called twice."""
        if goodbye:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(1):
                    await codec.send(self._stream, Close())
        await self._stream.close()
