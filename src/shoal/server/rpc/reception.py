"""Where streams arrive: with the handler of the present blocks, or with one that answers pings while there are none."""

from __future__ import annotations

import asyncio
import contextlib

from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.protocol import REQUEST_KINDS, AnyMessage, Close, Failure, Ping, Pong, ProtocolViolation
from shoal.server.refusals import Refused, failure_of, moving
from shoal.server.rpc.streams import FAILURE_SEND_SECONDS, Handler


class Reception:
    """The handler of all streams of a server, for as long as it lives.

    It passes them on to `handler`, the handler of the blocks that the server holds. While that is `None` it answers
    pings, so that others know that the server is alive, and says that it is changing its blocks.
    """

    def __init__(self, *, idle_seconds: float) -> None:
        self.handler: Handler | None = None
        self.num_streams = 0
        """The streams that it answers itself."""
        self._idle_seconds = idle_seconds

    async def __call__(self, stream: Stream) -> None:
        """Serve one stream until it ends."""
        if self.handler is not None:
            await self.handler(stream)
            return
        self.num_streams += 1
        try:
            await self._answer_pings(stream)
        except (StreamBroken, TimeoutError):
            pass
        except (ProtocolViolation, Refused) as refusal:
            await _tell(stream, failure_of(refusal))
        finally:
            self.num_streams -= 1
            await stream.close()

    async def _answer_pings(self, stream: Stream) -> None:
        while True:
            async with asyncio.timeout(self._idle_seconds):
                message, _ = await codec.receive(stream, REQUEST_KINDS, self._check)
            if isinstance(message, Close):
                return
            async with asyncio.timeout(self._idle_seconds):
                await codec.send(stream, Pong(working=False, num_passes=0))

    def _check(self, message: AnyMessage) -> None:
        """Raises `Refused` for all but pings, before anything else of the message is received.

        Once there are blocks also for these: the handler of the blocks answers on another stream.
        """
        if not isinstance(message, Close) and (self.handler is not None or not isinstance(message, Ping)):
            raise moving()


async def _tell(stream: Stream, failure: Failure) -> None:
    with contextlib.suppress(StreamBroken, TimeoutError):
        async with asyncio.timeout(FAILURE_SEND_SECONDS):
            await codec.send(stream, failure)
