"""A network inside one process, for tests: it loses, delays, garbles and kills exactly when it is told to.

    network = MemoryNetwork()
    client, server = network.node("client"), network.node("server")
    await server.transport.listen(handler)
    stream = await client.transport.open("server")
    network.kill("server")                       # receive() and send() raise StreamBroken at once

Time is the event loop's, so a loop with a virtual clock makes delays and expiry free. A peer's id is its name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import SwarmError
from shoal.net.faults import Faults
from shoal.net.transport import MAX_LIFETIME, Admit, Buffer, Node, StreamBroken, StreamHandler
from shoal.net.wire.frames import pack_prefix, payload_bytes
from shoal.peers import ModelInfo, ServerInfo
from shoal.protocol import ProtocolViolation

logger = logging.getLogger(__name__)

QUEUE_FRAMES = 16
"""Frames in flight in one direction of a stream: whoever sends more waits for the receiver."""


@dataclass(frozen=True)
class Frame:
    """One frame on its way."""

    sender: str
    receiver: str
    header: bytes
    payload: bytes


class MemoryNetwork:
    """The peers, their streams, what is wrong between them, and what they announced.

    `on_frame`, if set, sees every frame when it is sent and returns what is delivered: the frame, another, or None for
    nothing. It may also break the network itself.
    """

    def __init__(self) -> None:
        self.on_frame: Callable[[Frame], Frame | None] | None = None
        self.directory_answers = True
        self.faults = Faults()
        self._transports: dict[str, MemoryTransport] = {}
        self._links: dict[_Link, None] = {}  # as they were opened: nothing depends on where memory was free
        self._ended: dict[_Link, None] = {}  # with frames that somebody may wait for still
        self._announced: dict[tuple[str, str], tuple[ModelInfo, ServerInfo, float]] = {}

    def num_streams(self, peer: str) -> int:
        """How many are open that `peer` opened."""
        return sum(link.peers[0] == peer for link in self._links)

    def node(self, name: str) -> Node:
        """A new peer of this name; after `kill`, the same peer started again."""
        if name in self._transports and not self.faults.is_dead(name):
            raise ValueError(f"there is a peer {name!r} already")
        self.faults.revive(name)
        transport = MemoryTransport(self, name)
        self._transports[name] = transport
        return Node(transport, MemoryDirectory(self, transport))

    def kill(self, peer: str) -> None:
        """The process of `peer` dies: its streams break at once, what was in flight is lost, nobody can reach it."""
        self.faults.bury(peer)
        self.disconnect(peer)
        if peer in self._transports:
            self._transports[peer].abandon()

    def hang(self, peer: str, other: str | None = None) -> None:
        """`peer` becomes a black hole, for all or for one other: it can be opened and written to, nothing comes back.

        What was sent meanwhile arrives after `heal`.
        """
        self.mute(peer, other)
        self.faults.silence(other, peer)

    def mute(self, sender: str, receiver: str | None = None) -> None:
        """Nothing that `sender` sends arrives, anywhere or at one receiver, until `heal`; it hears the others still."""
        self.faults.silence(sender, receiver)

    def disconnect(self, one: str, other: str | None = None) -> None:
        """The streams of a peer break, or those between two, and what was in flight is lost; new ones can be opened."""
        for link in [*self._links]:
            if one in link.peers and (other is None or other in link.peers):
                link.break_()

    def cut(self, one: str, other: str | None = None) -> None:
        """The link between two peers breaks, or all of one, and with it the streams; `heal` lets them open new ones."""
        self.faults.cut(one, other)
        self.disconnect(one, other)

    def heal(self, *peers: str) -> None:
        """Undo `hang`, `mute`, `cut`, `delay` and `drop_after` for these peers, or for all; the dead stay dead."""
        self.faults.heal(*peers)
        self._ended = {link: None for link in self._ended if link.holds_frames}
        for link in [*self._links, *self._ended]:
            link.wake()

    def delay(self, seconds: float, *peers: str) -> None:
        """Frames arrive this much later: all, those of one peer, or those between two. Who sends does not wait.

        Their order is kept.
        """
        self.faults.delay(seconds, *peers)

    def drop_after(self, peer: str, frames: int) -> None:
        """The stream that carries the `frames`-th next frame that `peer` sends ends right behind it."""
        self.faults.drop_after(peer, frames)

    def connect(self, opener: str, peer: str) -> MemoryStream:
        acceptor = self._transports.get(peer)
        if acceptor is None or not self.faults.reachable(opener, peer):
            raise StreamBroken(f"{peer} cannot be reached")
        link = _Link(self, opener, peer)
        acceptor.accept(MemoryStream(link, me=1))
        self._links[link] = None
        return MemoryStream(link, me=0)

    def forget(self, link: _Link) -> None:
        self._links.pop(link, None)
        if link.holds_frames:
            self._ended[link] = None

    def is_current(self, transport: MemoryTransport) -> bool:
        """Whether this is a peer's process, and not what is left of one that was killed."""
        return self._transports[transport.peer] is transport and not self.faults.is_dead(transport.peer)

    # What directories ask of it.

    def publish(self, peer: str, model: ModelInfo, info: ServerInfo, expires: float) -> None:
        self._check_directory()
        self._announced[model.key, peer] = (model, info, expires)

    def announced(self) -> list[tuple[ModelInfo, ServerInfo]]:
        self._check_directory()
        now = asyncio.get_running_loop().time()
        self._announced = {key: entry for key, entry in self._announced.items() if entry[2] > now}
        return [(model, info) for _, (model, info, _) in sorted(self._announced.items(), key=lambda entry: entry[0])]

    def _check_directory(self) -> None:
        if not self.directory_answers:
            raise SwarmError("the directory does not answer")


class _Link:
    """Two bounded queues between two peers, and how they end."""

    def __init__(self, network: MemoryNetwork, opener: str, acceptor: str) -> None:
        self.peers = (opener, acceptor)
        self._network = network
        self._queues: tuple[deque[tuple[float, Frame]], ...] = (deque(), deque())
        self._ended = False
        self._broken = False
        self._changed = asyncio.Event()

    @property
    def holds_frames(self) -> bool:
        """Whether anything is on its way that can still arrive."""
        return not self._broken and any(self._queues)

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def break_(self) -> None:
        """Both sides see the end at once, and what was in flight is lost."""
        self._broken = True
        self.end()

    def end(self) -> None:
        """Nothing more is sent; what was, can still be received."""
        self._ended = True
        self._network.forget(self)
        self.wake()

    async def send(self, me: int, frame: Frame) -> None:
        queue = self._queues[me]
        while len(queue) >= QUEUE_FRAMES and not self._ended:
            await self._changed.wait()
        if self._ended:
            raise StreamBroken(f"the stream to {frame.receiver} has ended")
        hook = self._network.on_frame
        delivered = frame if hook is None else hook(frame)
        if delivered is not None:
            ready = asyncio.get_running_loop().time() + self._network.faults.latency(*self.peers)
            queue.append((ready, delivered))
        if self._network.faults.drops_now(frame.sender):
            self.end()
        self.wake()

    async def receive(self, me: int) -> Frame:
        queue = self._queues[1 - me]
        while True:
            if self._broken:
                raise StreamBroken(f"{self.peers[1 - me]} is gone")
            wait: float | None = None
            if not self._network.faults.silent(self.peers[1 - me], self.peers[me]):
                if queue:
                    wait = queue[0][0] - asyncio.get_running_loop().time()
                    if wait <= 0:
                        self.wake()
                        return queue.popleft()[1]
                elif self._ended:
                    raise StreamBroken(f"{self.peers[1 - me]} has closed the stream")
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue


class MemoryStream:
    """One side of a link."""

    def __init__(self, link: _Link, *, me: int) -> None:
        self._link = link
        self._me = me
        self._closed = False
        self._refused = False
        self.heard_at = self.taken_at = asyncio.get_running_loop().time()

    @property
    def peer(self) -> str:
        return self._link.peers[1 - self._me]

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        self._check_open()
        pack_prefix(len(header), payload_bytes(payload))
        frame = Frame(self._link.peers[self._me], self.peer, header, b"".join(payload))
        await self._link.send(self._me, frame)
        self.taken_at = asyncio.get_running_loop().time()

    async def receive(self, admit: Admit | None = None) -> tuple[bytes, bytearray]:
        self._check_open()
        if self._refused:
            raise StreamBroken(f"what {self.peer} sent was refused")
        frame = await self._link.receive(self._me)
        self.heard_at = asyncio.get_running_loop().time()
        try:
            if admit is not None:
                admit(frame.header, len(frame.payload))
        except ProtocolViolation:
            self._refused = True
            raise
        return frame.header, bytearray(frame.payload)

    async def close(self) -> None:
        self._closed = True
        self._link.end()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamBroken("this side has closed the stream")


class MemoryTransport:
    """`Transport` among the peers of one `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer: str) -> None:
        self._network = network
        self._peer = peer
        self._handler: StreamHandler | None = None
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._streams: list[MemoryStream] = []
        self._gone = False

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self._peer}",)

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> MemoryStream:
        if self._gone:
            raise StreamBroken("this transport is closed")
        await asyncio.sleep(0)  # others have their turn, as with any network
        stream = self._network.connect(self._peer, peer)
        self._streams.append(stream)
        return stream

    async def listen(self, handler: StreamHandler) -> None:
        self._handler = handler

    async def close(self) -> None:
        self.abandon()
        for stream in self._streams:
            await stream.close()
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)
        if self._network.is_current(self):
            self._network.kill(self._peer)

    def accept(self, stream: MemoryStream) -> None:
        """Run the handler for a stream that another peer opened."""
        if self._handler is None or self._gone:
            raise StreamBroken(f"{self._peer} does not listen")
        task = asyncio.create_task(self._serve(self._handler, stream))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    def abandon(self) -> None:
        """Stop whatever runs here, as the end of a process would."""
        self._gone = True
        for task in self._tasks:
            task.cancel()

    async def _serve(self, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception as failure:
            logger.warning("a stream of %s failed: %r", stream.peer, failure)
        finally:
            await stream.close()


class MemoryDirectory:
    """`Directory` among the peers of one `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, transport: MemoryTransport) -> None:
        self._network = network
        self._transport = transport

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        if info.peer != self._transport.peer or not 0 < lifetime <= MAX_LIFETIME:
            raise ValueError("a peer announces itself, for a while")
        if self._network.is_current(self._transport):
            self._network.publish(info.peer, model, info, asyncio.get_running_loop().time() + lifetime)

    async def servers(self, model: ModelInfo) -> tuple[ServerInfo, ...]:
        return tuple(info for announced, info in self._network.announced() if announced.key == model.key)

    async def models(self) -> tuple[ModelInfo, ...]:
        return tuple(sorted({model for model, _ in self._network.announced()}, key=lambda model: model.key))
