"""Measures the round-trip time to other peers, and learns how busy they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import Close, Ping, Pong, ProtocolViolation

DIAL_SECONDS = 5.0
"""How long connecting may take. A peer that needs longer is too far away to be useful."""
PONG_SECONDS = 2.0
"""How long the answer to a ping may take."""
PINGS = 2
"""The pings of one measurement; the quickest counts, because any one may meet a busy moment."""
MAX_CONCURRENT = 4
"""The measurements at the same time: more would delay each other on a slow link."""


@dataclass(frozen=True)
class PingAnswer:
    """What a ping found: the round trip in seconds, and what the server says of this moment, if it says it.

    It `is_relayed` if it went through a relay.
    """

    seconds: float
    is_relayed: bool = False
    queue_length: int | None = None
    cache_tokens_left: int | None = None

    def of(self, server: ServerInfo) -> ServerInfo:
        """A server as it is now, by what it announced and what it has answered."""
        return replace(
            server,
            queue_length=server.queue_length if self.queue_length is None else self.queue_length,
            cache_tokens_left=server.cache_tokens_left if self.cache_tokens_left is None else self.cache_tokens_left,
        )


async def ping(stream: Stream) -> PingAnswer | None:
    """The quickest of `PINGS` round trips over this stream, and the latest news; None if the peer does not answer."""
    loop = asyncio.get_running_loop()
    found: PingAnswer | None = None
    with contextlib.suppress(StreamBroken, ProtocolViolation, TimeoutError):
        for _ in range(PINGS):
            async with asyncio.timeout(PONG_SECONDS):
                sent = loop.time()
                await codec.send(stream, Ping())
                answer, _ = await codec.receive(stream, frozenset())
                if not isinstance(answer, Pong):
                    break
                seconds = loop.time() - sent
                quickest = seconds if found is None else min(found.seconds, seconds)
                found = PingAnswer(
                    quickest,
                    is_relayed="/p2p-circuit" in (stream.address or ""),
                    queue_length=answer.queue_length,
                    cache_tokens_left=answer.cache_tokens_left,
                )
    return found


async def ask(transport: Transport, peer: str, addresses: Sequence[str] = ()) -> PingAnswer | None:
    """Pings a peer over a new stream; None if it does not answer. Never raises.

    The time for opening the stream does not count.
    """
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            stream = await transport.open(peer, addresses)
    except (StreamBroken, TimeoutError):
        return None
    try:
        answer = await ping(stream)
        if answer is not None:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(PONG_SECONDS):
                    await codec.send(stream, Close())
        return answer
    finally:
        await stream.close()


async def ask_all(
    transport: Transport,
    servers: Iterable[ServerInfo],
    *,
    max_concurrent: int = MAX_CONCURRENT,
    seconds: float | None = None,
) -> dict[str, PingAnswer | None]:
    """Pings servers, and returns their answers by peer id; None for one that does not answer. Never raises.

    At most `max_concurrent` are pinged at the same time, and all of it takes at most `seconds`. Those for which that is
    too short are left out.
    """
    slots = asyncio.Semaphore(max_concurrent)
    found: dict[str, PingAnswer | None] = {}

    async def measure(server: ServerInfo) -> None:
        async with slots:
            found[server.peer] = await ask(transport, server.peer, server.addresses)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(measure(server))
    return found


async def measure_round_trips(
    transport: Transport,
    servers: Iterable[ServerInfo],
    *,
    max_concurrent: int = MAX_CONCURRENT,
    seconds: float | None = None,
) -> dict[str, float | None]:
    """The round-trip times to servers in seconds, by peer id; None for one that has not answered in time."""
    asked = tuple(servers)
    found = await ask_all(transport, asked, max_concurrent=max_concurrent, seconds=seconds)
    answers = ((server.peer, found.get(server.peer)) for server in asked)
    return {peer: None if answer is None else answer.seconds for peer, answer in answers}
