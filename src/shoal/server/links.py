"""The roads from server to server: who may push steps into which session here, and where ours are pushed to.

There is one stream to each server that follows us, for all sessions that go on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from shoal.net import codec
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.protocol import After, Before, Encoding, Step

log = logging.getLogger(__name__)

OPEN_SECONDS = 3.0
SEND_SECONDS = 30.0
IDLE_SECONDS = 60.0
"""A road that nobody uses for so long is given up."""
MAX_ROADS = 256

Inbox = Callable[[Step, codec.Tensors], None]


@dataclass(frozen=True)
class _Parcel:
    step: Step
    tensors: codec.Tensors
    encoding: Encoding
    failed: Callable[[], None]


class Links:
    """All links of one server."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._inboxes: dict[str, tuple[str, Inbox]] = {}
        self._roads: dict[str, _Road] = {}

    # -- from the server before ---------------------------------------------------------------------------------------

    def expect(self, before: Before, inbox: Inbox) -> None:
        """From now on, what this peer pushes over this link is given to `inbox`."""
        self._inboxes[before.link] = (before.peer, inbox)

    def forget(self, before: Before) -> None:
        """What comes over this link from now on means nothing. May be called twice."""
        self._inboxes.pop(before.link, None)

    async def listen(self, stream: Stream, step: Step, tensors: codec.Tensors) -> None:
        """Take what another server pushes, which has begun with this step, until it closes the stream.

        Steps of links that are not its own are ignored: their sessions may just have gone elsewhere.
        """
        while True:
            peer, inbox = self._inboxes.get(step.link or "", (None, None))
            if inbox is not None and peer == stream.peer:
                inbox(step, tensors)
            else:
                log.debug("%s pushes what nobody expects", stream.peer)
            message, tensors = await codec.receive(stream)
            if not isinstance(message, Step):
                return
            step = message

    # -- to the server after ------------------------------------------------------------------------------------------

    def prepare(self, after: After) -> None:
        """There will be something to push to this peer soon."""
        self._road(after)

    def push(
        self, after: After, step: Step, tensors: codec.Tensors, encoding: Encoding, *, failed: Callable[[], None]
    ) -> None:
        """Send a step on; `failed` is called if it is certain that it does not get there."""
        road = self._road(after)
        if road is None:
            failed()
        else:
            road.send(_Parcel(step.model_copy(update={"link": after.link}), tensors, encoding, failed))

    def _road(self, after: After) -> _Road | None:
        road = self._roads.get(after.peer)
        if road is None and len(self._roads) < MAX_ROADS:
            road = self._roads[after.peer] = _Road(self._transport, after, self._roads)
        return road

    async def close(self) -> None:
        """Give up all roads."""
        await asyncio.gather(*(road.close() for road in list(self._roads.values())))


class _Road:
    """A stream to one server, opened when it is first needed, and again when it broke."""

    def __init__(self, transport: Transport, after: After, roads: dict[str, _Road]) -> None:
        self._transport = transport
        self._after = after
        self._roads = roads
        self._parcels: asyncio.Queue[_Parcel] = asyncio.Queue()
        self._stream: Stream | None = None
        self._hearing: asyncio.Task[object] | None = None  # nothing is ever said: it ends when the stream does
        self._task = asyncio.create_task(self._run(), name=f"shoal-road-{after.peer[-8:]}")

    def send(self, parcel: _Parcel) -> None:
        self._parcels.put_nowait(parcel)

    async def _run(self) -> None:
        try:
            with contextlib.suppress(StreamBroken, TimeoutError):  # it may work when there is something to be sent
                await self._open()
            while (parcel := await self._next()) is not None:
                try:
                    await self._deliver(parcel)
                except (StreamBroken, TimeoutError) as failure:
                    log.info("%s cannot be pushed to: %s", self._after.peer, failure or "it takes too long")
                    await self._leave()
                    parcel.failed()
        finally:
            self._roads.pop(self._after.peer, None)
            await self._leave()

    async def _next(self) -> _Parcel | None:
        """What is to be sent next; None after a while in which there was nothing."""
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                return await self._parcels.get()
        except TimeoutError:
            if self._parcels.empty():
                self._roads.pop(self._after.peer, None)
                return None
            return self._parcels.get_nowait()

    async def _deliver(self, parcel: _Parcel) -> None:
        if self._stream is None or self._hearing is None or self._hearing.done():
            await self._leave()
            await self._open()
        assert self._stream is not None
        async with asyncio.timeout(SEND_SECONDS):
            await codec.send(self._stream, parcel.step, parcel.tensors, parcel.encoding)

    async def _open(self) -> None:
        async with asyncio.timeout(OPEN_SECONDS):
            self._stream = await self._transport.open(self._after.peer, self._after.addresses)
        self._hearing = asyncio.create_task(_until_end(self._stream))

    async def _leave(self) -> None:
        stream, self._stream = self._stream, None
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
            self._hearing = None
        if stream is not None:
            await stream.close()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _until_end(stream: Stream) -> None:
    with contextlib.suppress(StreamBroken):
        await stream.receive()
