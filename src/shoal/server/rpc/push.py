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

from shoal.concurrency import with_progress_timeout
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.protocol import REPLY_KINDS, REQUEST_KINDS, Downstream, ProtocolViolation, Step, Upstream
from shoal.tensors import Encoding

log = logging.getLogger(__name__)

OPEN_SECONDS = 6.0
SEND_SECONDS = 30.0
IDLE_SECONDS = 60.0
"""A stream that nobody uses for so long is closed, and opened again when it is needed."""
MAX_PUSH_CONNECTIONS = 256

Inbox = Callable[[Step, codec.Tensors], None]


class PushService:
    """All links of one server."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._inboxes: dict[str, tuple[str, Inbox]] = {}
        self._connections: dict[tuple[str, tuple[str, ...]], PushConnection] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of the roads, and of those that were just given up

    # -- from the server before ---------------------------------------------------------------------------------------

    def expect(self, upstream: Upstream, inbox: Inbox) -> None:
        """From now on, what this peer pushes over this link is given to `inbox`."""
        self._inboxes[upstream.link] = (upstream.peer, inbox)

    def forget(self, upstream: Upstream, inbox: Inbox) -> None:
        """What comes over this link from now on means nothing, unless another inbox has taken it over meanwhile."""
        if self._inboxes.get(upstream.link) == (upstream.peer, inbox):
            del self._inboxes[upstream.link]

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
                message, tensors = await codec.receive(stream, REQUEST_KINDS)
            if not isinstance(message, Step):
                return
            step = message

    # -- to the server after ------------------------------------------------------------------------------------------

    def handle_to(self, downstream: Downstream) -> PushHandle | None:
        """A way to this peer, which is prepared at once; None if there are too many roads."""
        # Whoever names a wrong address has a road of his own: nobody else's goes there.
        place = downstream.peer, downstream.addresses
        connection = self._connections.get(place)
        if connection is None:
            if len(self._connections) >= MAX_PUSH_CONNECTIONS:
                return None
            connection = self._connections[place] = PushConnection(
                self._transport, downstream, abandoned=lambda: self._give_up(place)
            )
            self._tasks.add(connection.task)
            connection.task.add_done_callback(self._tasks.discard)
        return PushHandle(connection, downstream.link)

    def _give_up(self, place: tuple[str, tuple[str, ...]]) -> None:
        self._connections.pop(place).task.cancel()

    async def close(self) -> None:
        """Give up all roads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class PushHandle:
    """The use that one session makes of a road."""

    def __init__(self, connection: PushConnection, link: str) -> None:
        self.num_waiting = 0
        self._road = connection
        self._link = link
        connection.handles.add(self)

    def push(self, step: Step, tensors: codec.Tensors, encoding: Encoding, *, done: Callable[[bool], None]) -> None:
        """Send a step on; `done` hears whether it was sent, or it is certain that it does not get there."""
        self.num_waiting += 1
        step = step.model_copy(update={"link": self._link})
        self._road.send(PushedStep(self, step, tensors, encoding, done))

    def close(self) -> None:
        """Forget what was not sent. May be called twice."""
        self._road.leave(self)


@dataclass(frozen=True, eq=False)
class PushedStep:
    handle: PushHandle
    step: Step
    tensors: codec.Tensors
    encoding: Encoding
    done: Callable[[bool], None]

    def settle(self, *, sent: bool) -> None:
        self.handle.num_waiting -= 1
        self.done(sent)


class PushConnection:
    """A stream to one server, opened at once, and when there is something to be sent and it broke meanwhile."""

    def __init__(self, transport: Transport, downstream: Downstream, *, abandoned: Callable[[], None]) -> None:
        self.handles: set[PushHandle] = set()
        self._transport = transport
        self._downstream = downstream
        self._abandoned = abandoned
        self._queue: deque[PushedStep] = deque()
        self._news = asyncio.Event()
        self._stream: Stream | None = None
        self._receiving: asyncio.Task[None] | None = None  # nothing is ever said: it ends when the stream does
        self.task = asyncio.create_task(self._run(), name=f"shoal-road-{downstream.peer[-8:]}")

    def send(self, pushed: PushedStep) -> None:
        self._queue.append(pushed)
        self._news.set()

    def leave(self, handle: PushHandle) -> None:
        """Somebody needs it no more; when the last has gone, it is given up."""
        if handle in self.handles:
            self.handles.remove(handle)
            self._queue = deque(pushed for pushed in self._queue if pushed.handle is not handle)
            if not self.handles:
                self._abandoned()

    async def _run(self) -> None:
        try:
            with contextlib.suppress(StreamBroken, TimeoutError):  # it may work when there is something to be sent
                await self._open()
            while True:
                pushed = await self._next()
                try:
                    await self._deliver(pushed)
                except (StreamBroken, TimeoutError) as failure:
                    log.info("%s cannot be pushed to: %s", self._downstream.peer, failure or "it takes too long")
                    await self._disconnect()
                    sent = False
                else:
                    sent = True
                if pushed.handle in self.handles:
                    pushed.settle(sent=sent)
        finally:
            await self._disconnect()

    async def _next(self) -> PushedStep:
        """What is to be sent next. After a while in which there is nothing, the stream is closed."""
        while not self._queue:
            self._news.clear()
            try:
                async with asyncio.timeout(None if self._stream is None else IDLE_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                await self._disconnect()
        return self._queue.popleft()

    async def _deliver(self, pushed: PushedStep) -> None:
        if self._stream is None or self._receiving is None or self._receiving.done():
            await self._disconnect()
            await self._open()
        assert self._stream is not None
        stream = self._stream
        sending = codec.send(stream, pushed.step, pushed.tensors, pushed.encoding)
        await with_progress_timeout(sending, lambda: stream.taken_at, seconds=SEND_SECONDS)

    async def _open(self) -> None:
        async with asyncio.timeout(OPEN_SECONDS):
            self._stream = await self._transport.open(self._downstream.peer, self._downstream.addresses)
        self._receiving = asyncio.create_task(_until_end(self._stream))

    async def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
            self._receiving = None
        if stream is not None:
            await stream.close()


async def _until_end(stream: Stream) -> None:
    with contextlib.suppress(StreamBroken, ProtocolViolation):
        await codec.receive(stream, REPLY_KINDS)
