"""Streams of a network in memory: two bounded queues of frames between two peers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.net.lines import Line
from shoal.net.memory.faults import Faults
from shoal.net.transport import Buffer, HeaderCheck, StreamBroken
from shoal.net.wire.frames import pack_prefix, payload_bytes

QUEUE_FRAMES = 16
"""Frames in transit in one direction of a stream: a sender that exceeds it waits for the receiver."""


@dataclass(frozen=True)
class Frame:
    """One frame in transit."""

    sender: str
    receiver: str
    header: bytes
    payload: bytes

    @property
    def num_bytes(self) -> int:
        """The length of the frame."""
        return len(self.header) + len(self.payload)


@dataclass(frozen=True)
class _InTransit:
    """A frame, and when its first and its last bytes arrive."""

    begins_at: float
    ends_at: float
    frame: Frame


@dataclass(frozen=True)
class _Sent:
    """What one side has sent: `before` bytes, and a frame of `num_bytes` evenly between two times."""

    before: int = 0
    begins: float = 0.0
    ends: float = 0.0
    num_bytes: int = 0

    def until(self, now: float) -> int:
        """The bytes that were sent until this time."""
        share = 1.0 if now >= self.ends else max(0.0, (now - self.begins) / (self.ends - self.begins))
        return self.before + int(share * self.num_bytes)


class MemoryLink:
    """Both directions of one stream.

    `faults` are asked for every frame. `alter` is given each frame that is sent, and returns the one to deliver, or
    None to lose it. `on_end` is called when nothing more can be sent.
    """

    def __init__(
        self,
        opener: str,
        acceptor: str,
        *,
        faults: Faults,
        alter: Callable[[Frame], Frame | None],
        on_end: Callable[[MemoryLink], None],
    ) -> None:
        self.peers = (opener, acceptor)
        self._faults = faults
        self._alter = alter
        self._on_end = on_end
        self._queues: tuple[deque[_InTransit], ...] = (deque(), deque())
        self._ended = False
        self._broken = False
        self._changed = [asyncio.Event(), asyncio.Event()]  # what the opener and what the acceptor has sent
        self._sent: list[_Sent] = [_Sent(), _Sent()]  # by the opener and by the acceptor

    @property
    def holds_frames(self) -> bool:
        """Whether a frame in transit can still arrive."""
        return not self._broken and any(self._queues)

    def wake(self) -> None:
        """Let all waiting senders and receivers look again."""
        self._wake(0)
        self._wake(1)

    def _wake(self, sender: int) -> None:
        """Let those look again who wait for what the opener (0) or the acceptor (1) sends, or for room in it."""
        self._changed[sender].set()
        self._changed[sender] = asyncio.Event()

    def break_(self) -> None:
        """End both directions at once, and lose the frames in transit."""
        self._broken = True
        self.end()

    def end(self) -> None:
        """Refuse more frames; those in transit can still be received."""
        self._ended = True
        self._on_end(self)
        self.wake()

    async def send(self, me: int, frame: Frame) -> None:
        """Send a frame as the opener (`me` is 0) or the acceptor (1). Raises `StreamBroken`."""
        queue = self._queues[me]
        while len(queue) >= QUEUE_FRAMES and not self._ended:
            await self._changed[me].wait()
        if self._ended:
            raise StreamBroken(f"the stream to {frame.receiver} has ended")
        delivered = self._alter(frame)
        now = asyncio.get_running_loop().time()
        begins, ends = self._faults.transmission(frame.sender, frame.receiver, frame.num_bytes, now=now)
        if delivered is not None:
            latency = self._faults.latency(*self.peers)
            queue.append(_InTransit(begins + latency, ends + latency, delivered))
        if self._faults.count_frame(frame.sender):
            self.end()
        self._wake(me)
        self._sent[me] = _Sent(self.sent_bytes(me), begins, ends, frame.num_bytes)
        if ends > now:
            await asyncio.sleep(ends - now)

    def sent_bytes(self, me: int) -> int:
        """The bytes that the opener (`me` is 0) or the acceptor (1) has sent until now."""
        return self._sent[me].until(asyncio.get_running_loop().time())

    async def peek(self, me: int) -> Frame:
        """The next frame for the opener (`me` is 0) or the acceptor (1), as soon as its header has arrived.

        Raises `StreamBroken`.
        """
        return (await self._next(me, lambda transit: transit.begins_at)).frame

    async def receive(self, me: int) -> Frame:
        """The next frame for the opener (`me` is 0) or the acceptor (1). Raises `StreamBroken`."""
        transit = await self._next(me, lambda transit: transit.ends_at)
        self._wake(1 - me)
        self._queues[1 - me].popleft()
        return transit.frame

    async def _next(self, me: int, arrives_at: Callable[[_InTransit], float]) -> _InTransit:
        queue = self._queues[1 - me]
        while True:
            if self._broken:
                raise StreamBroken(f"{self.peers[1 - me]} is gone")
            wait: float | None = None
            if not self._faults.is_muted(self.peers[1 - me], self.peers[me]):
                if queue:
                    wait = arrives_at(queue[0]) - asyncio.get_running_loop().time()
                    if wait <= 0:
                        return queue[0]
                elif self._ended:
                    raise StreamBroken(f"{self.peers[1 - me]} has closed the stream")
            try:
                async with asyncio.timeout(wait):
                    await self._changed[1 - me].wait()
            except TimeoutError:
                continue


class MemoryStream:
    """One side of a link: the opener's (`me` is 0) or the acceptor's (1)."""

    def __init__(self, link: MemoryLink, *, me: int, line: Line) -> None:
        self.line = line
        self._link = link
        self._me = me
        self._closed = False
        self._refused = False
        self._can_send = True
        self.has_served = False
        self.heard_at = self.taken_at = asyncio.get_running_loop().time()

    @property
    def peer(self) -> str:
        return self._link.peers[1 - self._me]

    @property
    def address(self) -> str | None:
        return None

    @property
    def taken_bytes(self) -> int:
        return self._link.sent_bytes(self._me)

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        self._check_open()
        pack_prefix(len(header), payload_bytes(payload))
        frame = Frame(self._link.peers[self._me], self.peer, header, b"".join(payload))
        if not self._can_send:
            raise StreamBroken(f"the stream to {self.peer} has ended")
        self._can_send = False  # as over a network: who is cancelled leaves half a frame behind
        await self._link.send(self._me, frame)
        self._can_send = True
        self.taken_at = asyncio.get_running_loop().time()
        self.has_served |= bool(frame.payload)

    async def receive(self, check_header: HeaderCheck | None = None) -> tuple[bytes, bytearray]:
        self._check_open()
        if self._refused:
            raise StreamBroken(f"a frame from {self.peer} was refused")
        frame = await self._link.peek(self._me)
        self.heard_at = asyncio.get_running_loop().time()
        try:
            if check_header is not None:
                check_header(frame.header, len(frame.payload))
        except Exception:
            self._refused = True
            raise
        frame = await self._link.receive(self._me)
        self.heard_at = asyncio.get_running_loop().time()
        return frame.header, bytearray(frame.payload)

    async def close(self) -> None:
        self._closed = True
        self._link.end()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamBroken("this side has closed the stream")
