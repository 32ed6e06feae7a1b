"""What a client sends on one stream, message after message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.protocol import REQUEST_KINDS, AnyMessage, Close

Received = tuple[AnyMessage, codec.Tensors]


class MessageReader:
    """Receives a stream's messages. A caller that stops waiting in the middle of one does not lose it.

    It is entered for as long as the stream is read: the message that is arriving is dropped when the context is left.
    `check` raises `Refused` for a message whose header says already that it will be refused.
    """

    def __init__(self, stream: Stream, check: Callable[[AnyMessage], None]) -> None:
        self.is_closed = False  # whether the client has sent `Close`
        self._stream = stream
        self._check = check
        self._receiving: asyncio.Task[Received] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
            self._receiving = None  # its error has frames that have this reader: a circle

    def receiving(self) -> asyncio.Task[Received]:
        """The task that receives the next message. It belongs to the reader."""
        self._receiving = self._receiving or asyncio.create_task(
            codec.receive(self._stream, REQUEST_KINDS, self._check)
        )
        return self._receiving

    async def next(self) -> Received:
        """The next message. Raises `StreamBroken`, `ProtocolViolation` and `Refused`."""
        message, tensors = await self.receiving()
        self._receiving = None
        self.is_closed |= isinstance(message, Close)
        return message, tensors
