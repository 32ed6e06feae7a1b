"""The network in memory: its peers, their transports and directories, and the ways to break it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence

from shoal.net.handler_tasks import HandlerTasks
from shoal.net.lines import Lines, SharedLine
from shoal.net.memory.faults import Faults
from shoal.net.memory.memory_directory import MemoryDirectory, MemoryRecord, MemoryTable
from shoal.net.memory.memory_stream import Frame, MemoryLink, MemoryStream
from shoal.net.transport import Node, StreamBroken, StreamHandler
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.network.reachability import Reach, Reachability


class MemoryNetwork:
    """The peers, their streams, the faults between them, and the announcements.

    `on_frame`, if set, is given every frame that is sent and returns the one to deliver, or None to lose it. It may
    also break the network itself. While `directory_answers` is false, every directory raises `SwarmError`.
    """

    def __init__(self) -> None:
        self.on_frame: Callable[[Frame], Frame | None] | None = None
        self.faults = Faults()
        self.reaches: dict[str, Reach] = {}
        self.reach_changed = asyncio.Event()
        self._transports: dict[str, MemoryTransport] = {}
        self._links: dict[MemoryLink, None] = {}  # in the order of opening: nothing depends on memory addresses
        self._ended: dict[MemoryLink, None] = {}  # those with frames that can still be received
        self._table = MemoryTable()
        self._secret = secrets.token_bytes(32)

    # The peers.

    @property
    def peers(self) -> tuple[str, ...]:
        """All peers that were ever made, dead ones too, in the order of their making."""
        return tuple(self._transports)

    def num_streams(self, peer: str) -> int:
        """The number of open streams that `peer` opened."""
        return sum(link.peers[0] == peer for link in self._links)

    def num_handlers(self, peer: str) -> int:
        """The number of streams, opened by other peers, that `peer` is handling."""
        return self._transports[peer].num_handlers

    def node(self, name: str, *, is_client: bool = False) -> Node:
        """Make a peer of this name; after `kill`, this is the same peer started again.

        A client may read more of the directory than a server.

        Raises `ValueError` if the peer is alive.
        """
        if name in self._transports and not self.faults.is_dead(name):
            raise ValueError(f"there is a peer {name!r} already")
        self.faults.revive(name)
        transport = MemoryTransport(self, name)
        self._transports[name] = transport
        directory = MemoryDirectory(
            self._table, name, is_client=is_client, is_current=lambda: self.is_current(transport)
        )
        return Node(transport, directory)

    async def close(self) -> None:
        """Close all transports."""
        for transport in self._transports.values():
            await transport.close()

    # The faults.

    def kill(self, peer: str) -> None:
        """End the process of `peer`: its streams break at once, frames in transit are lost, no peer can reach it."""
        self.faults.kill(peer)
        self.disconnect(peer)
        if peer in self._transports:
            self._transports[peer].abandon()

    def hang(self, peer: str, other: str | None = None) -> None:
        """Make `peer` a black hole for all peers, or for one: streams to it open, frames are held back.

        `heal` delivers the frames that were held back.
        """
        self.mute(peer, other)
        self.faults.mute(other, peer)

    def mute(self, sender: str, receiver: str | None = None) -> None:
        """Hold back what `sender` sends, to all peers or to one, until `heal`. It still receives."""
        self.faults.mute(sender, receiver)

    def disconnect(self, one: str, other: str | None = None) -> None:
        """Break the streams of a peer, or those between two, and lose the frames in transit. New streams can open."""
        for link in [*self._links]:
            if one in link.peers and (other is None or other in link.peers):
                link.break_()

    def cut(self, one: str, other: str | None = None) -> None:
        """Break the streams between two peers, or all of one, and refuse new ones until `heal`."""
        self.faults.cut(one, other)
        self.disconnect(one, other)

    def heal(self, *peers: str) -> None:
        """Undo `hang`, `mute`, `cut`, `delay`, `limit` and `drop_after` for these peers, or for all.

        Dead peers stay dead.
        """
        self.faults.heal(*peers)
        self._ended = {link: None for link in self._ended if link.holds_frames}
        for link in [*self._links, *self._ended]:
            link.wake()

    def set_reach(self, peer: str, kind: Reachability) -> None:
        """Let a peer find that others reach it in this way."""
        self.reaches[peer] = Reach(kind)
        self.reach_changed.set()
        self.reach_changed = asyncio.Event()

    def delay(self, seconds: float, *peers: str) -> None:
        """Delay all frames, those of one peer, or those between two. Their order is kept; senders do not wait."""
        self.faults.delay(seconds, *peers)

    def limit(self, peer: str, *, up: float | None = None, down: float | None = None) -> None:
        """Let a peer send and receive only this many bytes per second, over all of its streams, frame after frame.

        Senders wait until their frame has left. A header arrives before its payload.
        """
        self.faults.limit(peer, up=up, down=down)

    def drop_after(self, peer: str, frames: int) -> None:
        """End the stream that carries the `frames`-th next frame of `peer`, right behind that frame."""
        self.faults.drop_after(peer, frames)

    def line(self, peer: str, other: str) -> SharedLine:
        """What a peer knows of its line to another."""
        return self._transports[peer].lines.to(other)

    # The signatures. Names contain no keys, so the network itself knows which signature is whose.

    def sign(self, peer: str, data: bytes) -> bytes:
        """The signature of a peer: 64 bytes."""
        return hashlib.blake2b(b"%d:%s:%s" % (len(peer), peer.encode(), data), key=self._secret).digest()

    # Called by the transports.

    def connect(self, opener: str, peer: str) -> MemoryStream:
        """The opener's side of a new stream. Raises `StreamBroken`."""
        acceptor = self._transports.get(peer)
        if acceptor is None or not self.faults.can_connect(opener, peer):
            raise StreamBroken(f"{peer} cannot be reached")
        link = MemoryLink(opener, peer, faults=self.faults, alter=self._alter, on_end=self._on_end)
        acceptor.accept(MemoryStream(link, me=1, line=acceptor.lines.of_stream(opener)))
        self._links[link] = None
        return MemoryStream(link, me=0, line=self._transports[opener].lines.of_stream(peer))

    def is_current(self, transport: MemoryTransport) -> bool:
        """Whether its peer is alive and was not started again since."""
        return self._transports[transport.peer] is transport and not self.faults.is_dead(transport.peer)

    def _alter(self, frame: Frame) -> Frame | None:
        return frame if self.on_frame is None else self.on_frame(frame)

    def _on_end(self, link: MemoryLink) -> None:
        self._links.pop(link, None)
        if link.holds_frames:
            self._ended[link] = None

    # The announcements.

    @property
    def directory_answers(self) -> bool:
        """Whether the directory answers, as every test may decide."""
        return self._table.answers

    @directory_answers.setter
    def directory_answers(self, answers: bool) -> None:
        self._table.answers = answers

    @property
    def on_announce(self) -> Callable[[ServerInfo], ServerInfo] | None:
        """Is given each info that is announced, and returns what the directory gets instead."""
        return self._table.on_announce

    @on_announce.setter
    def on_announce(self, on_announce: Callable[[ServerInfo], ServerInfo] | None) -> None:
        self._table.on_announce = on_announce

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """The latest announcements, also those that have expired, whether or not the directory answers."""
        return self._table.records

    def edit_announcements(self, edit: Callable[[ServerInfo], ServerInfo]) -> None:
        """Replace each announced info by what `edit` returns for it."""
        self._table.edit(edit)

    def publish(self, peer: str, model: ModelInfo, info: ServerInfo, expires: float, *, level: int = 0) -> None:
        """Announce `info` until the loop's time is `expires`, at this level of the directory. Raises `SwarmError`."""
        self._table.publish(peer, model, info, expires, level=level)

    def announced(self) -> list[tuple[ModelInfo, ServerInfo]]:
        """The valid announcements, sorted by model key and peer. Raises `SwarmError`."""
        return [(record.model, record.info) for record in self._table.announced()]


class MemoryTransport:
    """`Transport` among the peers of one `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer: str) -> None:
        self.lines = Lines()
        self._network = network
        self._peer = peer
        self._handler: StreamHandler | None = None
        self._handlers = HandlerTasks()
        self._streams: list[MemoryStream] = []
        self._closed = False

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self._peer}",)

    @property
    def reach(self) -> Reach:
        return self._network.reaches.get(self._peer, Reach())

    async def reach_other_than(self, last: Reach) -> Reach:
        while self.reach == last:
            await self._network.reach_changed.wait()
        return self.reach

    @property
    def num_handlers(self) -> int:
        """The number of streams that are being handled."""
        return len(self._handlers)

    def sign(self, data: bytes) -> bytes:
        return self._network.sign(self._peer, data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        return self._network.sign(peer, data) == signature

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> MemoryStream:
        if self._closed:
            raise StreamBroken("this transport is closed")
        await asyncio.sleep(0)  # other tasks get their turn, as with a real network
        stream = self._network.connect(self._peer, peer)
        self._streams.append(stream)
        return stream

    async def listen(self, handler: StreamHandler) -> None:
        self._handler = handler

    async def close(self) -> None:
        self.abandon()
        for stream in self._streams:
            await stream.close()
        await self._handlers.wait()
        if self._network.is_current(self):
            self._network.kill(self._peer)

    def accept(self, stream: MemoryStream) -> None:
        """Handle a stream that another peer opened. Raises `StreamBroken` if this peer does not listen."""
        if self._handler is None or self._closed:
            raise StreamBroken(f"{self._peer} does not listen")
        self._handlers.start(self._handler, stream)

    def abandon(self) -> None:
        """Cancel all handlers and refuse new streams, as the end of a process would."""
        self._closed = True
        self._handlers.cancel(include_current=True)
