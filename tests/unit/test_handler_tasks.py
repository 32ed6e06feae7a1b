"""The streams of a transport: those that it has no room for are told so, and those that give way."""

from __future__ import annotations

import asyncio

import pytest
import torch

from shoal.net.memory.memory_network import MemoryNetwork
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.policy.network import stream_room
from shoal.protocol import Content, Failure, Ping, Pong

pytestmark = pytest.mark.anyio


async def served(stream: Stream) -> None:
    """Answer a ping, or what is asked for with a payload."""
    while True:
        message, _ = await codec.receive(stream)
        if isinstance(message, Ping):
            await codec.send(stream, Pong(working=False, num_passes=0))
        else:
            await codec.send(stream, Content(), {"content": torch.zeros(8, dtype=torch.uint8)})


async def failure_on(stream: Stream) -> Failure:
    async with asyncio.timeout(5):
        message, _ = await codec.receive(stream)
        with pytest.raises(StreamBroken):
            await codec.receive(stream)
    assert isinstance(message, Failure)
    return message


async def answers(stream: Stream) -> bool:
    async with asyncio.timeout(5):
        await codec.send(stream, Ping())
        message, _ = await codec.receive(stream)
    return isinstance(message, Pong)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> MemoryNetwork:
    monkeypatch.setattr(stream_room, "MAX_STREAMS", 12)
    monkeypatch.setattr(stream_room, "KEPT_STREAMS", 4)
    monkeypatch.setattr(stream_room, "MAX_STREAMS_PER_PEER", 6)
    return MemoryNetwork()


async def test_a_client_is_served_though_one_network_has_all_streams(network: MemoryNetwork):
    server = network.node("server").transport
    await server.listen(served)
    attackers = [network.node(f"attacker {index}").transport for index in range(4)]
    held = [await attacker.open("server") for attacker in attackers for _ in range(6)]
    assert network.num_handlers("server") == 8
    client = network.node("client").transport
    stream = await client.open("server")
    assert await answers(stream)
    assert network.num_handlers("server") == 8
    told = [asyncio.create_task(failure_on(stream)) for stream in held]
    async with asyncio.timeout(5):
        while sum(task.done() for task in told) < 24 - 7:  # noqa: ASYNC110 - each is told for itself
            await asyncio.sleep(0)
    assert {task.result().code for task in told if task.done()} == {"busy"}
    await network.close()
    await asyncio.gather(*told, return_exceptions=True)


async def test_a_peer_with_too_many_streams_hears_why(network: MemoryNetwork):
    server, client = network.node("server").transport, network.node("client").transport
    await server.listen(served)
    streams = [await client.open("server") for _ in range(6)]
    assert all([await answers(stream) for stream in streams])
    failure = await failure_on(await client.open("server"))
    assert failure.reason == "this peer has 6 streams here, and 6 are allowed"
    assert failure.retry_after
    await network.close()
