"""Which servers may push to which sessions and passes here, and the connections over which this server pushes its own.

There is one connection to each downstream server for all steps that go on there, and one for passes, whose inputs are
large: no step waits behind them. They last as long as there is anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from shoal.concurrency import now
from shoal.net.transport import Stream, Transport
from shoal.net.wire import codec
from shoal.protocol import REQUEST_KINDS, AnyMessage, Arrived, Downstream, PassInputs, Step, Upstream
from shoal.server.rpc.pushing.push_connection import PushConnection, Pushed, PushHandle
from shoal.server.rpc.pushing.unclaimed_pushes import UnclaimedPushes

log = logging.getLogger(__name__)

MAX_PUSH_CONNECTIONS = 256
"""How many servers this server pushes to at a time: clients name them, and each costs a stream. For steps to further
servers, the clients get `Unreached`; outputs of passes are answered only."""

Inbox = Callable[[Pushed, codec.Tensors], None]
Place = tuple[str, tuple[str, ...], bool]  # a peer, its addresses, and whether inputs of passes are pushed there


class PushService:
    """Takes what upstream servers push, and pushes to downstream servers, while `running()`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._inboxes: dict[str, tuple[str, Inbox]] = {}
        self._unclaimed = UnclaimedPushes()
        self._sweeping: asyncio.TimerHandle | None = None  # one timer for all that is held
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
            if self._sweeping is not None:
                self._sweeping.cancel()
                self._sweeping = None
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- from upstream servers ----------------------------------------------------------------------------------------

    def expect(self, upstream: Upstream, inbox: Inbox) -> None:
        """From now on, what this peer pushes over this link is given to `inbox`; at once what was too early."""
        self._inboxes[upstream.link] = (upstream.peer, inbox)
        if (early := self._unclaimed.claim(upstream.peer, upstream.link)) is not None:
            inbox(*early)

    def forget(self, upstream: Upstream, inbox: Inbox) -> None:
        """From now on, what comes over this link is ignored, unless another inbox expects them meanwhile."""
        if self._inboxes.get(upstream.link) == (upstream.peer, inbox):
            del self._inboxes[upstream.link]

    async def receive_pushes(
        self,
        stream: Stream,
        message: Pushed,
        tensors: codec.Tensors,
        *,
        check: Callable[[AnyMessage], None],
        idle_seconds: float,
    ) -> None:
        """Take what an upstream server pushes, beginning with this message, until it closes the stream.

        A step over a link that is not the peer's own is ignored: its session may just have gone elsewhere. The inputs
        of a pass are held for a while: its request may just be on its way. Raises
        `TimeoutError` if nothing comes for `idle_seconds`, `StreamBroken`, `ProtocolViolation`, and what `check` does
        for the header of a message.
        """
        while True:
            peer, inbox = self._inboxes.get(message.link or "", (None, None))
            if inbox is not None and peer == stream.peer:
                inbox(message, tensors)
            elif isinstance(message, PassInputs):
                self._unclaimed.hold(stream.peer, message, tensors, now=now())
                if self._sweeping is None:
                    self._sweep()
            else:
                log.debug("%s pushes a step that no session expects", stream.peer)
            async with asyncio.timeout(idle_seconds):
                if stream.line.shared.has_news and stream.line.is_told:
                    await codec.send(stream, Arrived())
                said, tensors = await codec.receive(stream, REQUEST_KINDS, check)
            if not isinstance(said, Step | PassInputs):
                return
            message = said

    def _sweep(self) -> None:
        """Drop what nothing has claimed in time, and come back when more of it is due."""
        due = self._unclaimed.sweep(now())
        self._sweeping = None if due is None else asyncio.get_running_loop().call_at(due, self._sweep)

    # -- to downstream servers ----------------------------------------------------------------------------------------

    def handle_to(self, downstream: Downstream, *, for_passes: bool = False) -> PushHandle | None:
        """A use of the connection to this peer, which is opened now; None if there are too many connections.

        A client that names wrong addresses gets a connection of its own: nothing of other clients goes there.
        """
        place = downstream.peer, downstream.addresses, for_passes
        if place not in self._connections:
            if len(self._connections) >= MAX_PUSH_CONNECTIONS or not self._is_running:
                return None
            connection = PushConnection(self.transport, downstream, abandoned=lambda: self._give_up(place))
            task = asyncio.create_task(connection.run(), name=f"shoal-push-{downstream.peer[-8:]}")
            self._connections[place] = connection, task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        connection, _ = self._connections[place]
        return PushHandle(connection, packs=bool(downstream.packs))

    def _give_up(self, place: Place) -> None:
        _, task = self._connections.pop(place)
        task.cancel()
