"""What shoal asks of a network: two small interfaces, so that tests need none.

`net/libp2p.py` is the real one, `net/memory.py` the one for tests. A `Stream` is ordered and reliable until it breaks,
and everything about breaking is one exception.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.peers import ModelInfo, ServerInfo

Buffer = bytes | bytearray | memoryview

Admit = Callable[[bytes, int], None]
"""Given a frame's header and how long the payload behind it is: raises `ProtocolViolation` unless that is wanted."""

CHUNK_BYTES = 256 * 1024
"""A large frame is sent in parts of this size."""
SLOWEST_LINK = 128 * 1024
"""Bytes per second: what is in flight over a link that is slower than this looks like silence."""
MAX_LIFETIME = 300.0
"""Seconds that an announcement may be valid for: the longest that a vanished server can haunt the directory."""


class StreamBroken(ConnectionError):
    """The other side is gone, or never was: refused, reset, crashed, closed or timed out."""


class Stream(Protocol):
    """Frames to and from one authenticated peer. One task may send while another receives."""

    @property
    def peer(self) -> str:
        """The other side's peer id."""
        ...

    @property
    def heard_at(self) -> float:
        """When anything came last, be it a part of a frame, by the event loop's clock; at first, when it was opened."""
        ...

    @property
    def taken_at(self) -> float:
        """When anything was last taken of what we send, be it a part of a frame."""
        ...

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        """Send one frame. Returns when it is buffered, waits when the other side is slow.

        The payload's buffers may be used again once this returns. Raises `StreamBroken`, and `ProtocolViolation` for a
        frame beyond the protocol's limits; a cancelled `send` leaves half a frame behind, so close the stream then.
        """
        ...

    async def receive(self, admit: Admit | None = None) -> tuple[bytes, bytearray]:
        """The next frame: its header and its payload.

        `admit` sees the header before anything of the payload is taken, and again when a receive that was cancelled
        goes on. What it raises is raised here, and nothing more can be received then; an answer can be sent still.
        Raises `StreamBroken` at the end of the stream, however it came, and for frames beyond the protocol's limits.
        """
        ...

    async def close(self) -> None:
        """Release the stream. Never raises, may be called twice."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Opens streams to peers and accepts theirs."""

    @property
    def peer(self) -> str:
        """Our own peer id."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can reach us, as they would write it after `--initial-peers`."""
        ...

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Stream:
        """A new stream to a peer; `addresses` are hints of where it may be.

        Raises `StreamBroken`.
        """
        ...

    async def listen(self, handler: StreamHandler) -> None:
        """From now until the transport closes, run `handler` for every stream that a peer opens.

        The stream is closed when its handler returns; a handler that raises is logged and hurts nobody else.
        """
        ...

    async def close(self) -> None:
        """End the handlers and the streams, and release everything. What was sent before is still delivered."""
        ...


class Directory(Protocol):
    """Who serves what: a distributed table of signed records that expire."""

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        """Publish `info` for `lifetime` seconds, at most `MAX_LIFETIME`; a later call replaces it.

        Raises `SwarmError`, also when none of the others answers.
        """
        ...

    async def servers(self, model: ModelInfo) -> tuple[ServerInfo, ...]:
        """The valid records of all blocks of a model, one a peer. Raises `SwarmError`, also when nobody answers."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """The models that anybody serves. Raises `SwarmError`, also when nobody answers."""
        ...


async def _nowhere(addresses: Sequence[str]) -> bool:
    return False


@dataclass(frozen=True)
class Node:
    """A peer's whole view of the network.

    `answers_elsewhere` tells whether another process that has this peer's identity answers at one of these addresses.
    """

    transport: Transport
    directory: Directory
    answers_elsewhere: Callable[[Sequence[str]], Awaitable[bool]] = _nowhere
