"""One of the two sockets of a connection through a proxy, and the data on its way from it to the other one."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from shoal.testing.link import MAX_SLICE_BYTES, LinkDirection

SOCKET_BUFFER_BYTES = 256 << 10
"""The system's buffers of a proxy's sockets: small, so that a sender notices a slow link."""
PUNCTUAL_SECONDS = 50e-6
"""Data that is due within this time is delivered in the same turn: the timers are not more precise."""

Delivery = Callable[["ProxySocket"], None]
"""Called with the other socket when the data, the end or the reset has crossed the link."""


class ProxySocket(asyncio.BufferedProtocol):
    """One socket, and the data on its way from it to the other one. `link` is what that data crosses."""

    # All sockets read into one buffer: the data is copied before another socket reads.
    _read_buffer = bytearray(MAX_SLICE_BYTES)

    def __init__(self, link: LinkDirection) -> None:
        self.lost = asyncio.Event()
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._other: ProxySocket | None = None
        self._in_transit: deque[tuple[float, Delivery]] = deque()  # by the time of arrival
        self._timer: asyncio.TimerHandle | None = None
        self._is_held = False  # by a black hole
        self._is_full = False  # the receiver does not read what is written here
        self._is_waiting_for_link = False
        self._received_eof = False
        self._sent_eof = False

    @property
    def is_connected(self) -> bool:
        """Whether it was ever connected."""
        return self._transport is not None

    @property
    def is_closing(self) -> bool:
        """Whether it is not connected, or no longer."""
        return self._transport is None or self._transport.is_closing()

    @property
    def _socket(self) -> socket.socket:
        assert self._transport is not None
        return cast(socket.socket, self._transport.get_extra_info("socket"))

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)
        for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, buffer, SOCKET_BUFFER_BYTES)
        # asyncio sets this only for sockets that were created with the protocol number of TCP.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.pause_reading()  # until the other socket is connected

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._read_buffer)[: self._link.link.slice_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        data, now = bytes(memoryview(self._read_buffer)[:nbytes]), self._loop.time()
        arrives_at = self._link.send(nbytes, now)
        if self._link.link.is_transparent and not self._in_transit and self._other is not None:
            self._other._write(data)
            return
        self._send(lambda other: other._write(data), arrives_at)
        if (free_at := self._link.queue_free_at()) > now:
            self._is_waiting_for_link = True
            self._loop.call_at(free_at, self.on_link_free)
            self._update()

    def eof_received(self) -> bool:
        self._received_eof = True
        self._send(ProxySocket._write_eof, self._link.send(0, self._loop.time()))
        return True  # the other direction continues

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if not self._received_eof:
            self._send(ProxySocket.reset, self._link.send(0, self._loop.time()))

    def pause_writing(self) -> None:
        self._is_full = True
        if self._other is not None:
            self._other._update()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._other is not None:
            self._other._update()

    # Called by the proxy.

    def join(self, other: ProxySocket) -> None:
        """Forward the data to the other socket from now on."""
        self._other = other
        self._update()

    def on_link_free(self) -> None:
        """The link's queue has room again."""
        self._is_waiting_for_link = False
        self._update()

    def hold(self, is_held: bool) -> None:
        """Stop reading and delivering, or continue."""
        self._is_held = is_held
        self._update()

    def reset(self) -> None:
        """Close the connection with a TCP reset, as a machine does that does not know the connection."""
        if self._transport is None or self.is_closing:
            return
        self._received_eof = True
        self._in_transit.clear()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # Called by the other socket, when something has crossed the link.

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _write_eof(self) -> None:
        if self._transport is None or self._transport.is_closing() or self._other is None:
            return
        try:
            self._transport.write_eof()
        except OSError:  # the connection was reset while nothing was read from it
            self._transport.abort()
        self._sent_eof = True
        if self._other._sent_eof:
            for end in (self, self._other):
                cast(asyncio.Transport, end._transport).close()

    # What is in transit.

    def _send(self, deliver: Delivery, arrives_at: float) -> None:
        """Call `deliver` at this time, but not before what was sent earlier."""
        if self._in_transit:
            arrives_at = max(arrives_at, self._in_transit[-1][0])
        self._in_transit.append((arrives_at, deliver))
        self._update()

    def _update(self) -> None:
        """Read if that is possible now, and set the timer for the next delivery."""
        if self._transport is None or self._other is None:
            return
        is_stopped = self._is_held or self._other._is_full
        if not self._transport.is_closing():
            if is_stopped or self._is_waiting_for_link or self._received_eof:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        if is_stopped:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None and self._in_transit:
            self._timer = self._loop.call_at(self._in_transit[0][0], self._deliver_due)

    def _deliver_due(self) -> None:
        self._timer = None
        assert self._other is not None
        until = self._loop.time() + PUNCTUAL_SECONDS
        while self._in_transit and self._in_transit[0][0] <= until and not self._other._is_full:
            self._in_transit.popleft()[1](self._other)
        self._update()
