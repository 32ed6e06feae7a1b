"""Our frames on one raw stream of the libp2p daemon.

The daemon's protobuf streams truncate silently and its unary calls stop at 4 MiB, so each of our streams is one raw
stream. A crash, a reset and a close all look like the end of the file there: what matters is said in band, as `Close`.
"""

from __future__ import annotations

from asyncio import IncompleteReadError, StreamReader, StreamWriter, get_running_loop
from collections.abc import Callable, Sequence

from shoal.net.transport import CHUNK_BYTES, Admit, Buffer, StreamBroken
from shoal.net.wire.frames import PREFIX_BYTES, pack_prefix, payload_bytes, unpack_prefix
from shoal.net.wire.unfinished_frames import UnfinishedFrames
from shoal.protocol import ProtocolViolation


class Libp2pStream:
    """One raw stream. A cancelled `receive` loses nothing; after a cancelled `send` the stream is broken.

    `address` is where the peer was reached, if we opened the stream; with `/p2p-circuit` in it, a relay carries it.
    What is held of a frame that is not whole has to have room among the `unfinished` ones of this peer.
    """

    def __init__(
        self,
        peer: str,
        reader: StreamReader,
        writer: StreamWriter,
        *,
        address: str | None = None,
        unfinished: UnfinishedFrames | None = None,
        on_close: Callable[[Libp2pStream], None] | None = None,
    ) -> None:
        self._peer = peer
        self.address = address
        self._clock = get_running_loop().time
        self.heard_at = self.taken_at = self._clock()
        self._on_close = on_close
        self._reader = reader
        self._writer = writer
        self._intact = True
        self._lengths: tuple[int, int] | None = None
        self._header: bytes | None = None
        self._payload = bytearray()
        self._refused = False
        self._unfinished = unfinished or UnfinishedFrames()
        self._taken = 0  # the room that this stream has there
        # `drain` returns when the socket has taken everything: no second queue behind the daemon's, and the caller's
        # buffers are free again.
        writer.transport.set_write_buffer_limits(high=0)

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        size = payload_bytes(payload)
        prefix = pack_prefix(len(header), size)
        if not self._intact:
            raise StreamBroken(f"the stream to {self._peer} has ended")
        self._intact = False
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
        self._intact = True

    async def receive(self, admit: Admit | None = None) -> tuple[bytes, bytearray]:
        if self._refused:
            raise StreamBroken(f"what {self._peer} sent was refused")
        try:
            header, payload_size = await self._receive_header()
            if admit is not None:
                self._admit(admit, header, payload_size)
            await self._receive_payload(payload_size)
        except OSError as failure:
            self._give_back()
            raise StreamBroken(f"the stream from {self._peer} broke: {failure.strerror or failure}") from None
        except EOFError as end:
            self._give_back()
            is_between_frames = self._lengths is None and isinstance(end, IncompleteReadError) and not end.partial
            where = "" if is_between_frames else " in the middle of a frame"
            raise StreamBroken(f"the stream from {self._peer} ended{where}") from None
        frame = header, self._payload
        self._lengths, self._header, self._payload = None, None, bytearray()
        self._give_back()
        return frame

    async def _receive_header(self) -> tuple[bytes, int]:
        try:
            if self._lengths is None:
                self._lengths = unpack_prefix(await self._reader.readexactly(PREFIX_BYTES))
        except ProtocolViolation as violation:
            await self.close()
            raise StreamBroken(f"{self._peer} sent {violation}") from None
        header_size, payload_size = self._lengths
        if self._header is None:
            self._header = await self._reader.readexactly(header_size)
            self.heard_at = self._clock()
        return self._header, payload_size

    def _admit(self, admit: Admit, header: bytes, payload_size: int) -> None:
        try:
            admit(header, payload_size)
        except ProtocolViolation:
            self._refused = True
            raise

    async def _receive_payload(self, size: int) -> None:
        if size > CHUNK_BYTES and not self._taken:
            await self._unfinished.take(self._peer, size)
            self._taken = size
        # It grows with what arrives, so that a promise of 256 MiB costs nothing; large blocks grow in place.
        while missing := size - len(self._payload):
            chunk = await self._reader.read(min(missing, CHUNK_BYTES))
            if not chunk:
                raise EOFError("in the middle of a frame")
            self._payload += chunk
            self.heard_at = self._clock()

    def _give_back(self) -> None:
        """The frame is whole, or will never be."""
        if self._taken:
            self._unfinished.give_back(self._peer, self._taken)
            self._taken = 0

    async def close(self) -> None:
        self._intact = False
        self._give_back()
        self._writer.close()
        if self._on_close is not None:
            self._on_close(self)

    async def _write(self, data: Buffer) -> None:
        self._writer.write(data)
        await self._writer.drain()
        self.taken_at = self._clock()
