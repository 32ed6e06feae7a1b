"""One connection over which a server pushes steps of sessions, and inputs of passes, to the next server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shoal.concurrency import owned_task, with_progress_timeout
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.protocol import Arrived, Downstream, PassInputs, ProtocolViolation, Step
from shoal.tensors import Encoding

log = logging.getLogger(__name__)

OPEN_SECONDS = 4.0
"""How long a stream may take to open. After this time, and never before, clients hear that it did not.

A client names the addresses. If it heard at once that nothing listens there, and later that something else does, it
could find out which ports are open in this machine's network."""
SEND_SECONDS = 30.0
"""A push of which nothing was taken for this long is given up: the next server is stopped, or as good as stopped."""
IDLE_SECONDS = 60.0
"""A stream over which nothing was pushed for this long is closed, and opened again when it is needed."""


Pushed = Step | PassInputs
"""The messages that servers push. Each names the link by which the receiver knows what it is for."""


class PushHandle:
    """The use that one session, or a client's passes, makes of a connection. `num_waiting` pushes are not sent yet.

    With `packs`, tensors are packed where that is faster.
    """

    def __init__(self, connection: PushConnection, *, packs: bool = False) -> None:
        self.num_waiting = 0
        self._connection = connection
        self._packs = packs
        connection.handles.add(self)

    def push(
        self, message: Pushed, tensors: codec.Tensors, encoding: Encoding, *, done: Callable[[bool], None]
    ) -> None:
        """Queue a message. `done` is called with whether it was sent; if not, it is certain not to arrive."""
        self.num_waiting += 1
        self._connection.send(QueuedPush(self, message, tensors, encoding, self._packs, done))

    @property
    def is_open(self) -> bool:
        """Whether the connection is still used."""
        return self in self._connection.handles

    def close(self) -> None:
        """Forget what was not sent. May be called twice."""
        self._connection.leave(self)


@dataclass(frozen=True, eq=False)
class QueuedPush:
    """A message in the queue of a connection."""

    handle: PushHandle
    message: Pushed
    tensors: codec.Tensors
    encoding: Encoding
    packs: bool
    done: Callable[[bool], None]

    def settle(self, *, sent: bool) -> None:
        """Tell its owner what has become of it, if that still uses the connection."""
        if self.handle.is_open:
            self.handle.num_waiting -= 1
            self.done(sent)


class PushConnection:
    """Sends what its handles push to one server, while `run` runs. `abandoned` is called when the last one leaves.

    The next server says nothing on the stream but how fast pushes arrive.
    """

    def __init__(self, transport: Transport, downstream: Downstream, *, abandoned: Callable[[], None]) -> None:
        self.handles: set[PushHandle] = set()
        self._transport = transport
        self._downstream = downstream
        self._abandoned = abandoned
        self._queue: deque[QueuedPush] = deque()
        self._news = asyncio.Event()
        self._is_broken = False
        self._num_pushed = 0  # over the present stream

    def send(self, pushed: QueuedPush) -> None:
        """Queue a message."""
        if self._is_broken:
            pushed.settle(sent=False)
            return
        self._queue.append(pushed)
        self._news.set()

    def leave(self, handle: PushHandle) -> None:
        """A handle needs the connection no more."""
        if handle in self.handles:
            self.handles.remove(handle)
            self._queue = deque(pushed for pushed in self._queue if pushed.handle is not handle)
            if not self.handles:
                self._abandoned()

    async def run(self) -> None:
        """Open a stream at once, and send over it; another one when something is to be sent and that one broke."""
        try:
            pushed = await self._use_stream(None)
            while True:
                pushed = await self._use_stream(pushed or await self._next(None))
        except Exception:  # a defect of ours: the sessions are told, and other connections go on
            log.exception("the connection to push to %s failed", self._downstream.peer)
            self._is_broken = True
            while self._queue:
                self._queue.popleft().settle(sent=False)

    async def _use_stream(self, pushed: QueuedPush | None) -> QueuedPush | None:
        """Open a stream, and send this message and those that follow over it until it breaks or is idle.

        Returns the message that is to be sent over another stream, because this one had ended before.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + OPEN_SECONDS
        try:
            async with asyncio.timeout_at(until):
                stream = await self._transport.open(self._downstream.peer, self._downstream.addresses)
        except (StreamBroken, TimeoutError) as failure:
            await asyncio.sleep(until - clock())
            if pushed is not None:
                self._fail(pushed, failure)
            while self._queue:  # they would be told after another such time
                self._fail(self._queue.popleft(), failure)
            return None
        self._num_pushed = 0
        try:
            async with owned_task(self._until_end(stream)) as ending:
                return await self._send_all(stream, pushed, ending)
        finally:
            await stream.close()

    async def _send_all(
        self, stream: Stream, pushed: QueuedPush | None, ending: asyncio.Task[None]
    ) -> QueuedPush | None:
        while pushed := pushed or await self._next(IDLE_SECONDS):
            if ending.done():
                return pushed
            self._num_pushed += 1
            sending = codec.send(stream, pushed.message, pushed.tensors, pushed.encoding, packs=pushed.packs)
            try:
                await with_progress_timeout(sending, lambda: stream.taken_at, seconds=SEND_SECONDS)
            except (StreamBroken, TimeoutError) as failure:
                self._fail(pushed, failure)
                return None
            pushed.settle(sent=True)
            pushed = None
        return None

    async def _until_end(self, stream: Stream) -> None:
        """Hear how fast pushes arrive, until the next server ends the stream, or says more than was pushed."""
        num_arrived = 0
        with contextlib.suppress(StreamBroken, ProtocolViolation):
            while True:
                message, _ = await codec.receive(stream, frozenset())
                num_arrived += 1
                if not isinstance(message, Arrived) or num_arrived > self._num_pushed:
                    return

    async def _next(self, seconds: float | None) -> QueuedPush | None:
        """The message that is to be sent next; None if there is none for `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._queue:
                    self._news.clear()
                    await self._news.wait()
                return self._queue.popleft()
        return None

    def _fail(self, pushed: QueuedPush, failure: Exception) -> None:
        reason = str(failure) or "it takes too long"
        log.info("nothing could be pushed to %s: %s", self._downstream.peer, reason)
        pushed.settle(sent=False)
