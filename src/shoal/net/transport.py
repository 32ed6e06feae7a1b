"""What shoal needs of a network, as interfaces: `Stream`, `Transport` and `Directory`.

`shoal.net.libp2p` implements them on the real network, `shoal.net.memory` inside one process for tests. A stream is
ordered and reliable until it breaks, and every way of breaking is one exception, `StreamBroken`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.net.lines import Line
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.census.histogram import Histogram
from shoal.policy.network.reachability import Reach

Buffer = bytes | bytearray | memoryview

HeaderCheck = Callable[[bytes, int], None]
"""Called with a frame's header and the bytes of its payload. Raises `ProtocolViolation` to refuse the frame."""

CHUNK_BYTES = 256 * 1024
"""Bytes. A larger frame is sent in parts of this size, and counts against its sender while it is received."""
SLOWEST_LINK = 128 * 1024
"""Bytes per second. Timeouts assume that every link has this speed at least: a slower one looks like a silent peer."""
MAX_LIFETIME = 300.0
"""Seconds. An announcement is valid for at most this long, so a vanished server leaves the directory after it."""


class StreamBroken(ConnectionError):
    """The stream has ended or could not be opened: refused, reset, crashed, closed or timed out."""


class Stream(Protocol):
    """Frames to and from one authenticated peer. One task may send while another receives."""

    @property
    def peer(self) -> str:
        """The other side's peer id."""
        ...

    @property
    def address(self) -> str | None:
        """The other side's multiaddress, if it is known; one through a relay contains `/p2p-circuit`."""
        ...

    @property
    def line(self) -> Line:
        """The line to the other side."""
        ...

    @property
    def heard_at(self) -> float:
        """The event loop's time when any part of a frame was last received; at first, when the stream was opened."""
        ...

    @property
    def taken_at(self) -> float:
        """The event loop's time when any part of a frame was last sent; at first, when the stream was opened."""
        ...

    @property
    def taken_bytes(self) -> int:
        """The bytes that were sent until now, in parts of a frame where it is large."""
        ...

    @property
    def has_served(self) -> bool:
        """Whether a payload was sent over it."""
        ...

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        """Send one frame. Returns when the frame is buffered; waits while the other side reads too slowly.

        The caller may reuse the payload's buffers afterwards. A cancelled `send` may leave half a frame behind: close
        the stream then. Raises `StreamBroken`, and `ProtocolViolation` for a frame beyond the protocol's limits.
        """
        ...

    async def receive(self, check_header: HeaderCheck | None = None) -> tuple[bytes, bytearray]:
        """The next frame: its header and its payload.

        `check_header` is called before any of the payload is read, and once more if a cancelled `receive` is repeated.
        If it refuses the frame, its `ProtocolViolation` is raised and nothing more can be received; sending still
        works. Raises `StreamBroken` at the end of the stream, and for a frame beyond the protocol's limits.
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
        """This peer's own id."""
        ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """The multiaddresses at which other peers reach this one, in the form that `--initial-peers` takes."""
        ...

    @property
    def reach(self) -> Reach:
        """How others reach this peer, as far as it is known."""
        ...

    async def reach_other_than(self, last: Reach) -> Reach:
        """How others reach this peer, as soon as that is not `last` any more."""
        ...

    def sign(self, data: bytes) -> bytes:
        """This peer's signature of `data`: 64 bytes."""
        ...

    def verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is that of a peer for `data`. False, without an error, for anything malformed."""
        ...

    async def open(self, peer: str, addresses: Sequence[str] = ()) -> Stream:
        """Open a stream to a peer. `addresses` are multiaddresses to try first. Raises `StreamBroken`."""
        ...

    async def listen(self, handler: StreamHandler) -> None:
        """Run `handler` for every stream that a peer opens, until the transport closes.

        The stream is closed when its handler returns. If a handler raises, that is logged; other streams continue.
        """
        ...

    async def close(self) -> None:
        """Cancel the handlers and close the streams. What was sent before is still delivered."""
        ...


class Directory(Protocol):
    """Which servers hold which blocks of which model: a distributed table of signed records that expire."""

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        """Publish `info` for `lifetime` seconds, at most `MAX_LIFETIME`. A later call replaces it.

        In a large swarm it is published for longer, up to `MAX_LIFETIME`, and a call that says nothing new may wait
        for its turn (`shoal.net.participant`).

        Raises `SwarmError`, also when no other peer answers, and `ValueError` for a wrong lifetime.
        """
        ...

    async def servers(self, model: ModelInfo, *, blocks: Collection[int] = ()) -> tuple[ServerInfo, ...]:
        """The servers of a model, by their latest valid records. Raises `SwarmError`, also when no peer answers.

        All of a small swarm are read each time. Of a large one, a call reads as much as the peer's allowance of bytes
        permits, and returns all that is known: a random sample, which is another one after some minutes. It also
        searches for more holders of `blocks`, which the caller misses.
        """
        ...

    async def histogram(self, model: ModelInfo) -> Histogram:
        """How many servers of a model hold which spans, and how fast they are: all that placement needs to know.

        Raises `SwarmError`, also when no peer answers.
        """
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """The models that are served. Raises `SwarmError`, also when no peer answers."""
        ...


@dataclass(frozen=True)
class RelayTrial:
    """What a relay did for a peer: the seconds that a megabyte took through it, or why none came through."""

    relay: str
    seconds: float | None
    why: str = ""


async def _answers_nowhere(addresses: Sequence[str]) -> bool:
    return False


async def _no_relays() -> tuple[RelayTrial, ...]:
    return ()


@dataclass(frozen=True)
class Node:
    """A peer's access to the network.

    `answers_elsewhere` checks whether a process with this peer's identity answers at one of the given addresses.
    `try_relays` tries the relays that this peer could have.
    """

    transport: Transport
    directory: Directory
    answers_elsewhere: Callable[[Sequence[str]], Awaitable[bool]] = _answers_nowhere
    try_relays: Callable[[], Awaitable[tuple[RelayTrial, ...]]] = _no_relays
