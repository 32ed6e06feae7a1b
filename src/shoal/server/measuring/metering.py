"""A transport that notices how fast the large frames of sessions come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.net.lines import Line
from shoal.net.transport import CHUNK_BYTES, Buffer, HeaderCheck, Node, Stream, StreamHandler, Transport
from shoal.policy.network.network_speed import Bulk, Direction, Seen
from shoal.policy.network.reachability import Reach

LARGE_BYTES = CHUNK_BYTES
"""Smaller frames tell nothing: they fit into buffers."""


class Meter:
    """The large frames that are under way in each direction. `on_seen` is called with what a bulk of them shows."""

    def __init__(self) -> None:
        self.on_seen: Callable[[Direction, Seen], None] = lambda direction, seen: None
        self._bulks: dict[Direction, Bulk] = {"up": Bulk(), "down": Bulk()}

    @property
    def is_idle(self) -> bool:
        """Whether no large frame is under way."""
        return not any(bulk.num_open for bulk in self._bulks.values())

    def begin(self, direction: Direction) -> None:
        """A large frame begins."""
        self._bulks[direction] = self._bulks[direction].opened(now=asyncio.get_running_loop().time())

    def end(self, direction: Direction, num_bytes: int) -> None:
        """A large frame is complete; it has 0 bytes if it was given up."""
        bulk = self._bulks[direction].closed(num_bytes, now=asyncio.get_running_loop().time())
        seen = bulk.seen
        if seen is not None:
            bulk = replace(bulk, num_bytes=0, seconds=0.0)
        self._bulks[direction] = bulk
        if seen is not None:
            self.on_seen(direction, seen)


def metered(node: Node, meter: Meter) -> Node:
    """The same access to the network; `meter` is told of the large frames."""
    return replace(node, transport=_MeteredTransport(node.transport, meter))


class _MeteredTransport:
    """`Transport` whose streams tell the meter."""

    def __init__(self, transport: Transport, meter: Meter) -> None:
        self._transport = transport
        self._meter = meter

    @property
    def peer(self) -> str:
        return self._transport.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses

    @property
    def reach(self) -> Reach:
        return self._transport.reach

    async def reach_other_than(self, last: Reach) -> Reach:
        return await self._transport.reach_other_than(last)

    def sign(self, data: bytes) -> bytes:
        return self._transport.sign(data)

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        return self._transport.verify(peer, data, signature)

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Stream:
        return _MeteredStream(await self._transport.open(peer, addresses), self._meter)

    async def listen(self, handler: StreamHandler) -> None:
        await self._transport.listen(lambda stream: handler(_MeteredStream(stream, self._meter)))

    async def close(self) -> None:
        await self._transport.close()


class _MeteredStream:
    """`Stream` that tells the meter when a large frame begins and ends."""

    def __init__(self, stream: Stream, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def address(self) -> str | None:
        return self._stream.address

    @property
    def line(self) -> Line:
        return self._stream.line

    @property
    def heard_at(self) -> float:
        return self._stream.heard_at

    @property
    def taken_at(self) -> float:
        return self._stream.taken_at

    @property
    def taken_bytes(self) -> int:
        return self._stream.taken_bytes

    @property
    def has_served(self) -> bool:
        return self._stream.has_served

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        num_bytes = sum(memoryview(buffer).nbytes for buffer in payload)
        if num_bytes < LARGE_BYTES:
            await self._stream.send(header, payload)
            return
        sent = 0
        self._meter.begin("up")
        try:
            await self._stream.send(header, payload)
            sent = num_bytes
        finally:
            self._meter.end("up", sent)

    async def receive(self, check_header: HeaderCheck | None = None) -> tuple[bytes, bytearray]:
        has_begun = False
        received = 0

        def begin(header: bytes, num_bytes: int) -> None:
            nonlocal has_begun
            if check_header is not None:
                check_header(header, num_bytes)
            if num_bytes >= LARGE_BYTES:
                self._meter.begin("down")
                has_begun = True

        try:
            frame = await self._stream.receive(begin)
            received = len(frame[1])
            return frame
        finally:
            if has_begun:
                self._meter.end("down", received)

    async def close(self) -> None:
        await self._stream.close()
