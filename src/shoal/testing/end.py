"""One socket of a connection that passes a door, and what is on its way from it to the other one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from shoal.testing.link import MAX_SLICE_BYTES, LinkDirection

SOCKET_BUFFER_BYTES = 256 << 10
"""The system's buffers on both sides of a door: small, so that a slow link is felt by who sends."""
PUNCTUAL_SECONDS = 50e-6
"""What arrives so little later is delivered along."""


class ProxySocket(asyncio.BufferedProtocol):
    """One socket, and what is on its way from it to the other one."""

    _shared = bytearray(MAX_SLICE_BYTES)  # what has been read into it is copied before anybody else reads

    def __init__(self, lane: LinkDirection) -> None:
        self.lost = asyncio.Event()
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._other: ProxySocket | None = None
        self._on_the_way: deque[tuple[float, Callable[[ProxySocket], None]]] = deque()
        self._arrival: asyncio.TimerHandle | None = None
        self._is_held = False  # by a black hole
        self._is_full = False  # what is written here is not taken
        self._is_waiting = False  # for room on the link
        self._saw_end = False
        self._gave_end = False

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    @property
    def _socket(self) -> socket.socket:
        assert self._transport is not None
        return cast(socket.socket, self._transport.get_extra_info("socket"))

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    # What the socket does.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)
        for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, buffer, SOCKET_BUFFER_BYTES)
        # asyncio does so only for sockets that were made with the number of TCP.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.pause_reading()  # until the other end is there

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._shared)[: self._lane.link.slice_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        data, now = bytes(memoryview(self._shared)[:nbytes]), self._loop.time()
        at = self._lane.send(nbytes, now)
        if self._lane.link.is_transparent and not self._on_the_way and self._other is not None:
            self._other._write(data)
            return
        self._send(lambda other: other._write(data), at)
        if (room_at := self._lane.room_at()) > now:
            self._is_waiting = True
            self._loop.call_at(room_at, self.have_room)
            self._flow()

    def eof_received(self) -> bool:
        self._saw_end = True
        self._send(ProxySocket._end, self._lane.send(0, self._loop.time()))
        return True  # the other direction goes on

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if not self._saw_end:
            self._send(ProxySocket.reset, self._lane.send(0, self._loop.time()))

    def pause_writing(self) -> None:
        self._is_full = True
        if self._other is not None:
            self._other._flow()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._other is not None:
            self._other._flow()

    # What is done to it.

    def join(self, other: ProxySocket) -> None:
        """Send to the other end from now on."""
        self._other = other
        self._flow()

    def have_room(self) -> None:
        """The link takes more."""
        self._is_waiting = False
        self._flow()

    def hold(self, is_held: bool) -> None:
        """Take nothing and deliver nothing; or go on with it."""
        self._is_held = is_held
        self._flow()

    def reset(self) -> None:
        """Break it, as a machine does that knows nothing of this connection."""
        if self._transport is None or self.is_closing:
            return
        self._saw_end = True
        self._on_the_way.clear()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _end(self) -> None:
        """The other one has said all."""
        if self._transport is None or self._transport.is_closing() or self._other is None:
            return
        try:
            self._transport.write_eof()
        except OSError:  # it was reset meanwhile, and nobody was reading
            self._transport.abort()
        self._gave_end = True
        if self._other._gave_end:
            for end in (self, self._other):
                cast(asyncio.Transport, end._transport).close()

    # What travels.

    def _send(self, deliver: Callable[[ProxySocket], None], at: float) -> None:
        """Do something to the other end at a time, but not before what was sent earlier."""
        if self._on_the_way:
            at = max(at, self._on_the_way[-1][0])
        self._on_the_way.append((at, deliver))
        self._flow()

    def _flow(self) -> None:
        """Read if it may be, and see to it that what is on the way is delivered."""
        if self._transport is None or self._other is None:
            return
        is_stopped = self._is_held or self._other._is_full
        if not self._transport.is_closing():
            if is_stopped or self._is_waiting or self._saw_end:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        if is_stopped:
            if self._arrival is not None:
                self._arrival.cancel()
                self._arrival = None
        elif self._arrival is None and self._on_the_way:
            self._arrival = self._loop.call_at(self._on_the_way[0][0], self._arrive)

    def _arrive(self) -> None:
        self._arrival = None
        assert self._other is not None
        until = self._loop.time() + PUNCTUAL_SECONDS
        while self._on_the_way and self._on_the_way[0][0] <= until and not self._other._is_full:
            self._on_the_way.popleft()[1](self._other)
        self._flow()
