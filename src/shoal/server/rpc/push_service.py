"""Which servers may push steps into which sessions here, and the connections over which this server pushes its own.

There is one connection to each downstream server, for all sessions that go on there, for as long as there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from shoal.net.transport import Stream, Transport
from shoal.net.wire import codec
from shoal.protocol import REQUEST_KINDS, AnyMessage, Arrived, Downstream, Step, Upstream
from shoal.server.rpc.push_connection import PushConnection, PushHandle

log = logging.getLogger(__name__)

MAX_PUSH_CONNECTIONS = 256
"""How many servers this server pushes to at a time: clients name them, and each costs a stream. For steps to further
servers, the clients get `Unreached`."""

Inbox = Callable[[Step, codec.Tensors], None]
Place = tuple[str, tuple[str, ...]]  # a peer and its addresses


class PushService:
    """Takes the steps that upstream servers push, and pushes steps to downstream servers, while `running()`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._inboxes: dict[str, tuple[str, Inbox]] = {}
        self._connections: dict[Place, tuple[PushConnection, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of the connections, and of those that were just given up
        self._is_running = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections may be opened while this is entered; all are closed when it is left."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- from upstream servers ----------------------------------------------------------------------------------------

    def expect(self, upstream: Upstream, inbox: Inbox) -> None:
        """From now on, the steps that this peer pushes over this link are given to `inbox`."""
        self._inboxes[upstream.link] = (upstream.peer, inbox)

    def forget(self, upstream: Upstream, inbox: Inbox) -> None:
        """From now on, steps over this link are ignored, unless another inbox expects them meanwhile."""
        if self._inboxes.get(upstream.link) == (upstream.peer, inbox):
            del self._inboxes[upstream.link]

    async def receive_pushes(
        self,
        stream: Stream,
        step: Step,
        tensors: codec.Tensors,
        *,
        check: Callable[[AnyMessage], None],
        idle_seconds: float,
    ) -> None:
        """Take what an upstream server pushes, beginning with this step, until it closes the stream.

        A step over a link that is not the peer's own is ignored: its session may just have gone elsewhere. Raises
        `TimeoutError` if nothing comes for `idle_seconds`, `StreamBroken`, `ProtocolViolation`, and what `check` does
        for the header of a message.
        """
        while True:
            peer, inbox = self._inboxes.get(step.link or "", (None, None))
            if inbox is not None and peer == stream.peer:
                inbox(step, tensors)
            else:
                log.debug("%s pushes a step that no session expects", stream.peer)
            async with asyncio.timeout(idle_seconds):
                if stream.line.shared.has_news and stream.line.is_told:
                    await codec.send(stream, Arrived())
                message, tensors = await codec.receive(stream, REQUEST_KINDS, check)
            if not isinstance(message, Step):
                return
            step = message

    # -- to downstream servers ----------------------------------------------------------------------------------------

    def handle_to(self, downstream: Downstream) -> PushHandle | None:
        """A session's use of the connection to this peer, which is opened now; None if there are too many connections.

        A client that names wrong addresses gets a connection of its own: no other session's steps go there.
        """
        place = downstream.peer, downstream.addresses
        if place not in self._connections:
            if len(self._connections) >= MAX_PUSH_CONNECTIONS or not self._is_running:
                return None
            connection = PushConnection(self.transport, downstream, abandoned=lambda: self._give_up(place))
            task = asyncio.create_task(connection.run(), name=f"shoal-push-{downstream.peer[-8:]}")
            self._connections[place] = connection, task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        connection, _ = self._connections[place]
        return PushHandle(connection, downstream.link, packs=bool(downstream.packs))

    def _give_up(self, place: Place) -> None:
        _, task = self._connections.pop(place)
        task.cancel()
