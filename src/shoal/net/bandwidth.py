"""Measures how many bytes per second go to another peer, and come from it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence

import torch

from shoal.net.ping import DIAL_SECONDS, PONG_SECONDS, ping
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.protocol import (
    MAX_TRANSFER_BYTES,
    TRANSFER_KINDS,
    AnyMessage,
    Close,
    Failure,
    Filler,
    ProtocolViolation,
    Transfer,
)

SIZES = (256 << 10, 1 << 20, MAX_TRANSFER_BYTES)
"""Bytes of one transfer after another, until one takes `ENOUGH_SECONDS`. All together, 5.25 MiB in each direction."""
ENOUGH_SECONDS = 0.5
"""A transfer that takes so long tells the speed: much longer than a connection needs to get up to it."""
TRANSFER_SECONDS = 20.0
"""The longest that one transfer may take, over any link that is worth measuring."""
SHORTEST_SECONDS = 1e-5
"""No transfer takes less, whatever the clock says."""


class NotGranted(Exception):
    """The peer has no time for this now."""


async def measure_bandwidth(
    transport: Transport, peer: str, addresses: Sequence[str] = ()
) -> tuple[float | None, float | None]:
    """The bytes per second to a peer and from it, as far as it helps to measure them. Never raises.

    Both are what arrived: the peer proves by a digest what it got.
    """
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            stream = await transport.open(peer, addresses)
    except (StreamBroken, TimeoutError):
        return None, None
    try:
        answer = await ping(stream)
        if answer is None:
            return None, None
        up = await _rate(_upload, stream, answer.seconds)
        down = await _rate(_download, stream, answer.seconds)
        with contextlib.suppress(StreamBroken, TimeoutError):
            async with asyncio.timeout(PONG_SECONDS):
                await codec.send(stream, Close())
        return up, down
    finally:
        await stream.close()


async def _rate(transfer: Callable[[Stream, int], Awaitable[float]], stream: Stream, round_trip: float) -> float | None:
    """Bytes per second of the largest of several transfers that was completed."""
    rate = None
    with contextlib.suppress(StreamBroken, ProtocolViolation, NotGranted, TimeoutError):
        for size in SIZES:
            async with asyncio.timeout(TRANSFER_SECONDS):
                seconds = await transfer(stream, size)
            # A trip that took longer before than it takes now must not make the transfer look much faster.
            seconds = max(seconds - round_trip, seconds / 4, SHORTEST_SECONDS)
            rate = size / seconds
            if seconds > ENOUGH_SECONDS:
                break
    return rate


async def _upload(stream: Stream, size: int) -> float:
    """Send `size` bytes; returns the seconds until the peer had them."""
    await codec.send(stream, Transfer(sends=size))
    await receive_filler(stream, 0)
    filler = random_bytes(size)
    began = asyncio.get_running_loop().time()
    await codec.send(stream, Filler(), {"filler": filler})
    answer, _ = await receive_filler(stream, 0)
    seconds = asyncio.get_running_loop().time() - began
    if answer.digest != digest_of(filler):
        raise ProtocolViolation("an answer to other bytes than were sent")
    return seconds


async def _download(stream: Stream, size: int) -> float:
    """Receive `size` bytes; returns the seconds since they were asked for."""
    began = asyncio.get_running_loop().time()
    await codec.send(stream, Transfer(wants=size))
    await receive_filler(stream, size)
    return asyncio.get_running_loop().time() - began


def random_bytes(num_bytes: int) -> torch.Tensor:
    """`num_bytes` bytes [N] that no link can make smaller, and that the other side cannot guess."""
    return torch.frombuffer(bytearray(os.urandom(num_bytes)), dtype=torch.uint8)


def digest_of(filler: torch.Tensor) -> str:
    """What proves that these bytes [N] have come."""
    return hashlib.blake2b(filler.numpy().data, digest_size=16).hexdigest()


async def receive_filler(stream: Stream, num_bytes: int) -> tuple[Filler, torch.Tensor | None]:
    """The next message, which has to be a `Filler` with `num_bytes` bytes, and these bytes [N], if any.

    Raises `NotGranted` for a `Failure`, `ProtocolViolation` for all else, before any of it is read, and `StreamBroken`.
    """
    parsed: list[AnyMessage] = []

    def check_header(header: bytes, payload_bytes: int) -> None:
        message = codec.parse_header(header, payload_bytes, TRANSFER_KINDS)
        if isinstance(message, Filler) and payload_bytes != num_bytes:
            raise ProtocolViolation(f"{payload_bytes} bytes instead of {num_bytes}")
        parsed.append(message)

    header, payload = await stream.receive(check_header)
    message = parsed[-1]
    if isinstance(message, Failure):
        raise NotGranted(message.reason)
    if not isinstance(message, Filler):
        raise ProtocolViolation(f"a message of kind {message.kind!r} instead of bytes")
    return message, codec.decode(header, payload)[1].get("filler")
