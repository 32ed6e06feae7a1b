"""Strangers from one address open all streams of a real peer: another address has room, and is told nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from shoal.concurrency import owned_task
from shoal.net import NetworkConfig, join
from shoal.net.addressing.addresses import network_of
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.network import stream_room
from shoal.protocol import Failure

pytestmark = pytest.mark.anyio

PATIENCE = 60.0
REASON = "no stream is free, and the peers of 127.0.1.1 have 8 of them"
GAVE_WAY = "others need this stream"


async def test_a_client_is_answered_though_another_address_holds_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_room, "MAX_STREAMS", 10)
    monkeypatch.setattr(stream_room, "KEPT_STREAMS", 2)
    monkeypatch.setattr(stream_room, "MAX_STREAMS_PER_PEER", 5)
    seen: list[str] = []

    async def echo(stream: Stream) -> None:
        seen.append(network_of(stream.address))
        while True:
            header, payload = await stream.receive()
            await stream.send(header, [payload])

    async def is_answered(stream: Stream) -> bool:
        await stream.send(b"hello")
        return (await stream.receive())[0] == b"hello"

    async with asyncio.timeout(PATIENCE), contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(join(NetworkConfig(host="127.0.0.1")))
        await server.transport.listen(echo)
        peers = server.transport.addresses
        held: list[Stream] = []
        for host in "127.0.1.1", "127.0.1.1":
            config = NetworkConfig(host=host, initial_peers=peers)
            attacker = await stack.enter_async_context(join(config))
            held += [await attacker.transport.open(server.transport.peer) for _ in range(5)]
        config = NetworkConfig(host="127.0.0.1", initial_peers=peers, client_mode=True)
        client = await stack.enter_async_context(join(config))
        stream = await client.transport.open(server.transport.peer)
        assert await is_answered(stream)
        assert set(seen) == {"127.0.1.1", "127.0.0.1"}
        # Two of the streams gave way to others, and one found no room: any of them, since they may overtake each other.
        answers = [await stack.enter_async_context(owned_task(codec.receive(each))) for each in held]
        while sum(each.done() for each in answers) < 3:
            await asyncio.wait([each for each in answers if not each.done()], return_when=asyncio.FIRST_COMPLETED)
        told = [each.result()[0] for each in answers if each.done()]
        assert all(isinstance(each, Failure) and each.code == "busy" and each.retry_after == 5.0 for each in told)
        assert Counter(each.reason for each in told if isinstance(each, Failure)) == {REASON: 1, GAVE_WAY: 2}
