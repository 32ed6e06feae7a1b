"""`Stream` on one raw stream of the libp2p daemon.

The daemon's protobuf streams truncate data without an error, and its unary calls are limited to 4 MiB, so shoal sends
its frames over raw streams. There a crash, a reset and a close all look like the end of a file: a peer that ends a
stream on purpose sends the message `Close` first.
"""

from __future__ import annotations

from asyncio import IncompleteReadError, StreamReader, StreamWriter, get_running_loop
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.net.addressing.addresses import network_of
from shoal.net.lines import Line
from shoal.net.transport import CHUNK_BYTES, Buffer, HeaderCheck, StreamBroken
from shoal.net.wire.frames import PREFIX_BYTES, pack_prefix, payload_bytes, unpack_prefix
from shoal.net.wire.receive_budget import ReceiveBudget, Reservation
from shoal.policy.network.frame_room import Frame
from shoal.protocol import ProtocolViolation


class _GaveWay(ConnectionError):
    """A frame was ended because others needed its room."""


@dataclass
class _Incoming:
    """What has come of the next frame: its lengths, its header, a part of its payload; and the room that it has."""

    lengths: tuple[int, int] | None = None
    header: bytes | None = None
    payload: bytearray = field(default_factory=bytearray)
    reservation: Reservation | None = None


class Libp2pStream:
    """One raw stream. A cancelled `receive` loses nothing; after a cancelled `send` the stream is broken.

    Frames wait until the `budget` has room for them. `on_close` is called with the stream.
    """

    def __init__(
        self,
        peer: str,
        reader: StreamReader,
        writer: StreamWriter,
        *,
        address: str | None = None,
        line: Line | None = None,
        budget: ReceiveBudget | None = None,
        on_close: Callable[[Libp2pStream], None] | None = None,
    ) -> None:
        self._peer = peer
        self.address = address
        self.line = line or Line()
        self._clock = get_running_loop().time
        self.heard_at = self.taken_at = self._clock()
        self.taken_bytes = 0
        self.has_served = False
        self._on_close = on_close
        self._reader = reader
        self._writer = writer
        self._can_send = True
        self._incoming = _Incoming()
        self._refused = False
        self._budget = ReceiveBudget() if budget is None else budget
        # `drain` returns when the socket has accepted all data: there is no queue in addition to the daemon's, and the
        # caller may reuse its buffers.
        writer.transport.set_write_buffer_limits(high=0)

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        size = payload_bytes(payload)
        prefix = pack_prefix(len(header), size)
        if not self._can_send:
            raise StreamBroken(f"the stream to {self._peer} has ended")
        self._can_send = False
        try:
            if size <= CHUNK_BYTES:
                await self._write(b"".join((prefix, header, *payload)))
            else:
                await self._write(prefix + header)
                for buffer in payload:
                    view = memoryview(buffer).cast("B")
                    for start in range(0, len(view), CHUNK_BYTES):
                        await self._write(view[start : start + CHUNK_BYTES])
        except OSError as failure:
            raise StreamBroken(f"the stream to {self._peer} broke: {failure.strerror or failure}") from None
        self._can_send = True
        self.has_served |= size > 0

    async def receive(self, check_header: HeaderCheck | None = None) -> tuple[bytes, bytearray]:
        if self._refused:
            raise StreamBroken(f"a frame from {self._peer} was refused")
        try:
            header, payload_size = await self._receive_header()
            if check_header is not None:
                self._check(check_header, header, payload_size)
            await self._receive_payload(payload_size)
        except OSError as failure:
            self._release_budget()
            raise StreamBroken(f"the stream from {self._peer} broke: {failure.strerror or failure}") from None
        except EOFError as end:
            self._release_budget()
            is_between_frames = (
                self._incoming.lengths is None and isinstance(end, IncompleteReadError) and not end.partial
            )
            where = "" if is_between_frames else " in the middle of a frame"
            raise StreamBroken(f"the stream from {self._peer} ended{where}") from None
        frame = header, self._incoming.payload
        self._release_budget()
        self._incoming = _Incoming()
        return frame

    async def _receive_header(self) -> tuple[bytes, int]:
        incoming = self._incoming
        try:
            if incoming.lengths is None:
                incoming.lengths = unpack_prefix(await self._reader.readexactly(PREFIX_BYTES))
        except ProtocolViolation as violation:
            await self.close()
            raise StreamBroken(f"{self._peer} sent {violation}") from None
        header_size, payload_size = incoming.lengths
        if incoming.header is None:
            incoming.header = await self._reader.readexactly(header_size)
            self.heard_at = self._clock()
        return incoming.header, payload_size

    def _check(self, check_header: HeaderCheck, header: bytes, payload_size: int) -> None:
        try:
            check_header(header, payload_size)
        except Exception:  # whatever the check raises: the payload behind this header is not received
            self._refused = True
            raise

    async def _receive_payload(self, size: int) -> None:
        incoming = self._incoming
        if size and incoming.reservation is None:
            frame = Frame(self._peer, network_of(self.address), size, self._clock())
            incoming.reservation = await self._budget.acquire(
                frame, num_received=lambda: len(incoming.payload), give_way=self._give_way
            )
        # The buffer grows as data arrives, so announcing 256 MiB costs no memory. Large buffers grow in place.
        while missing := size - len(incoming.payload):
            chunk = await self._reader.read(min(missing, CHUNK_BYTES))
            if not chunk:
                raise EOFError("in the middle of a frame")
            incoming.payload += chunk
            self.heard_at = self._clock()

    def _give_way(self) -> None:
        """Others need the room of the frame that is being received: nothing more is."""
        self._incoming = _Incoming()
        self._refused = True
        self._reader.set_exception(_GaveWay(0, "the frame came too slowly, and others needed its room"))

    def _release_budget(self) -> None:
        """The frame is complete, or was lost."""
        if self._incoming.reservation is not None:
            self._budget.release(self._incoming.reservation)
            self._incoming.reservation = None

    async def close(self) -> None:
        self._can_send = False
        self._release_budget()
        self._writer.close()
        if self._on_close is not None:
            self._on_close(self)

    async def _write(self, data: Buffer) -> None:
        self._writer.write(data)
        await self._writer.drain()
        self.taken_at = self._clock()
        self.taken_bytes += memoryview(data).nbytes
