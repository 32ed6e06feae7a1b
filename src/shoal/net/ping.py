"""How far another peer is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import REPLY_KINDS, Close, Ping, Pong, ProtocolViolation

DIAL_SECONDS = 5.0
"""How long connecting may take; then nobody is there, or so far away that it does not matter."""
PONG_SECONDS = 2.0
PINGS = 2
AT_ONCE = 4


async def round_trip(stream: Stream) -> float | None:
    """Seconds until a ping on this stream is answered, the quickest of a few; None if it is not."""
    loop = asyncio.get_running_loop()
    seconds: list[float] = []
    with contextlib.suppress(StreamBroken, ProtocolViolation, TimeoutError):
        for _ in range(PINGS):
            async with asyncio.timeout(PONG_SECONDS):
                sent = loop.time()
                await codec.send(stream, Ping())
                answer, _ = await codec.receive(stream, REPLY_KINDS)
                if not isinstance(answer, Pong):
                    break
                seconds.append(loop.time() - sent)
    return min(seconds, default=None)


async def distance(transport: Transport, peer: str, addresses: Sequence[str] = ()) -> float | None:
    """The same on a stream of its own, which does not count; None if nobody answers. Never raises."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            stream = await transport.open(peer, addresses)
    except (StreamBroken, TimeoutError):
        return None
    try:
        seconds = await round_trip(stream)
        if seconds is not None:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(PONG_SECONDS):
                    await codec.send(stream, Close())
        return seconds
    finally:
        await stream.close()


async def distances(
    transport: Transport, servers: Iterable[ServerInfo], *, at_once: int = AT_ONCE, seconds: float | None = None
) -> dict[str, float | None]:
    """Of many, a few at a time, by peer id; of those who have not answered after so many seconds it is not known."""
    few = asyncio.Semaphore(at_once)
    found: dict[str, float | None] = {}

    async def measure(server: ServerInfo) -> None:
        found[server.peer] = None
        async with few:
            found[server.peer] = await distance(transport, server.peer, server.addresses)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(measure(server))
    return found
