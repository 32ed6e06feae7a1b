"""The roads from server to server: who may push steps into which session here, and where ours are pushed to.

There is one stream to each server that follows us, for all sessions that go on there, as long as there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shoal.concurrency import while_moving
from shoal.net import codec
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.protocol import ANSWERS, QUESTIONS, After, Before, ProtocolViolation, Step
from shoal.tensors import Encoding

log = logging.getLogger(__name__)

OPEN_SECONDS = 6.0
SEND_SECONDS = 30.0
IDLE_SECONDS = 60.0
"""A stream that nobody uses for so long is closed, and opened again when it is needed."""
MAX_ROADS = 256

Inbox = Callable[[Step, codec.Tensors], None]


class Links:
    """All links of one server."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._inboxes: dict[str, tuple[str, Inbox]] = {}
        self._roads: dict[tuple[str, tuple[str, ...]], _Road] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of the roads, and of those that were just given up

    # -- from the server before ---------------------------------------------------------------------------------------

    def expect(self, before: Before, inbox: Inbox) -> None:
        """From now on, what this peer pushes over this link is given to `inbox`."""
        self._inboxes[before.link] = (before.peer, inbox)

    def forget(self, before: Before, inbox: Inbox) -> None:
        """What comes over this link from now on means nothing, unless another inbox has taken it over meanwhile."""
        if self._inboxes.get(before.link) == (before.peer, inbox):
            del self._inboxes[before.link]

    async def listen(self, stream: Stream, step: Step, tensors: codec.Tensors, *, idle_seconds: float) -> None:
        """Take what another server pushes, which has begun with this step, until it closes the stream.

        Steps of links that are not its own are ignored: their sessions may just have gone elsewhere. Raises
        `TimeoutError` if nothing comes for so long, and what breaks streams.
        """
        while True:
            peer, inbox = self._inboxes.get(step.link or "", (None, None))
            if inbox is not None and peer == stream.peer:
                inbox(step, tensors)
            else:
                log.debug("%s pushes what nobody expects", stream.peer)
            async with asyncio.timeout(idle_seconds):
                message, tensors = await codec.receive(stream, QUESTIONS)
            if not isinstance(message, Step):
                return
            step = message

    # -- to the server after ------------------------------------------------------------------------------------------

    def way_to(self, after: After) -> Way | None:
        """A way to this peer, which is prepared at once; None if there are too many roads."""
        # Whoever names a wrong address has a road of his own: nobody else's goes there.
        place = after.peer, after.addresses
        road = self._roads.get(place)
        if road is None:
            if len(self._roads) >= MAX_ROADS:
                return None
            road = self._roads[place] = _Road(self._transport, after, abandoned=lambda: self._give_up(place))
            self._tasks.add(road.task)
            road.task.add_done_callback(self._tasks.discard)
        return Way(road, after.link)

    def _give_up(self, place: tuple[str, tuple[str, ...]]) -> None:
        self._roads.pop(place).task.cancel()

    async def close(self) -> None:
        """Give up all roads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Way:
    """The use that one session makes of a road."""

    def __init__(self, road: _Road, link: str) -> None:
        self.num_waiting = 0
        self._road = road
        self._link = link
        road.ways.add(self)

    def push(self, step: Step, tensors: codec.Tensors, encoding: Encoding, *, done: Callable[[bool], None]) -> None:
        """Send a step on; `done` hears whether it was sent, or it is certain that it does not get there."""
        self.num_waiting += 1
        step = step.model_copy(update={"link": self._link})
        self._road.send(_Parcel(self, step, tensors, encoding, done))

    def close(self) -> None:
        """Forget what was not sent. May be called twice."""
        self._road.leave(self)


@dataclass(frozen=True, eq=False)
class _Parcel:
    way: Way
    step: Step
    tensors: codec.Tensors
    encoding: Encoding
    done: Callable[[bool], None]

    def settle(self, *, sent: bool) -> None:
        self.way.num_waiting -= 1
        self.done(sent)


class _Road:
    """A stream to one server, opened at once, and when there is something to be sent and it broke meanwhile."""

    def __init__(self, transport: Transport, after: After, *, abandoned: Callable[[], None]) -> None:
        self.ways: set[Way] = set()
        self._transport = transport
        self._after = after
        self._abandoned = abandoned
        self._parcels: deque[_Parcel] = deque()
        self._news = asyncio.Event()
        self._stream: Stream | None = None
        self._hearing: asyncio.Task[None] | None = None  # nothing is ever said: it ends when the stream does
        self.task = asyncio.create_task(self._run(), name=f"shoal-road-{after.peer[-8:]}")

    def send(self, parcel: _Parcel) -> None:
        self._parcels.append(parcel)
        self._news.set()

    def leave(self, way: Way) -> None:
        """Somebody needs it no more; when the last has gone, it is given up."""
        if way in self.ways:
            self.ways.remove(way)
            self._parcels = deque(parcel for parcel in self._parcels if parcel.way is not way)
            if not self.ways:
                self._abandoned()

    async def _run(self) -> None:
        try:
            with contextlib.suppress(StreamBroken, TimeoutError):  # it may work when there is something to be sent
                await self._open()
            while True:
                parcel = await self._next()
                try:
                    await self._deliver(parcel)
                except (StreamBroken, TimeoutError) as failure:
                    log.info("%s cannot be pushed to: %s", self._after.peer, failure or "it takes too long")
                    await self._disconnect()
                    sent = False
                else:
                    sent = True
                if parcel.way in self.ways:
                    parcel.settle(sent=sent)
        finally:
            await self._disconnect()

    async def _next(self) -> _Parcel:
        """What is to be sent next. After a while in which there is nothing, the stream is closed."""
        while not self._parcels:
            self._news.clear()
            try:
                async with asyncio.timeout(None if self._stream is None else IDLE_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                await self._disconnect()
        return self._parcels.popleft()

    async def _deliver(self, parcel: _Parcel) -> None:
        if self._stream is None or self._hearing is None or self._hearing.done():
            await self._disconnect()
            await self._open()
        assert self._stream is not None
        stream = self._stream
        sending = codec.send(stream, parcel.step, parcel.tensors, parcel.encoding)
        await while_moving(sending, lambda: stream.taken_at, seconds=SEND_SECONDS)

    async def _open(self) -> None:
        async with asyncio.timeout(OPEN_SECONDS):
            self._stream = await self._transport.open(self._after.peer, self._after.addresses)
        self._hearing = asyncio.create_task(_until_end(self._stream))

    async def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
            self._hearing = None
        if stream is not None:
            await stream.close()


async def _until_end(stream: Stream) -> None:
    with contextlib.suppress(StreamBroken, ProtocolViolation):
        await codec.receive(stream, ANSWERS)
