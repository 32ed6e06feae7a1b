"""A server without blocks, because it is changing them: it answers pings, and sends everything else elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal.net.memory import MemoryNetwork
from shoal.net.ping import ask
from shoal.net.transport import Stream, StreamBroken, Transport
from shoal.net.wire import codec
from shoal.protocol import Failure, Norms, Ping, Pong
from shoal.server.rpc.reception import Reception

from . import virtual_time

IDLE_SECONDS = 60.0


def play(scene: Callable[[Transport, Reception], Awaitable[None]]) -> None:
    async def run() -> None:
        network, reception = MemoryNetwork(), Reception(idle_seconds=IDLE_SECONDS)
        await network.node("server").transport.listen(reception)
        await scene(network.node("client").transport, reception)
        await network.close()
        assert not reception.num_streams

    virtual_time.run(run())


async def until_it_ends(stream: Stream) -> None:
    with pytest.raises(StreamBroken):
        await codec.receive(stream)


def test_it_answers_pings():
    async def scene(client: Transport, _: Reception) -> None:
        assert await ask(client, "server") is not None
        stream = await client.open("server")
        for _ in range(3):
            await codec.send(stream, Ping())
            answer, _ = await codec.receive(stream)
            assert isinstance(answer, Pong)
            assert not answer.working

    play(scene)


def test_it_says_that_a_request_is_for_another_server():
    async def scene(client: Transport, _: Reception) -> None:
        stream = await client.open("server")
        await codec.send(stream, Norms(model="m", fingerprint="f", start=0, end=1, modules=("q_proj",)))
        answer, _ = await codec.receive(stream)
        assert isinstance(answer, Failure)
        assert answer.code == "moved"
        await until_it_ends(stream)

    play(scene)


def test_a_stream_that_began_before_there_were_blocks_ends_once_there_are_some():
    """The client opens another one, which the handler of the blocks serves."""
    served: list[str] = []

    async def serve(stream: Stream) -> None:
        served.append(stream.peer)
        await stream.close()

    async def scene(client: Transport, reception: Reception) -> None:
        early = await client.open("server")
        await codec.send(early, Ping())
        assert isinstance((await codec.receive(early))[0], Pong)
        reception.handler = serve  # type: ignore[assignment]
        await codec.send(early, Ping())
        assert isinstance((await codec.receive(early))[0], Failure)
        late = await client.open("server")
        await until_it_ends(late)
        assert served == ["client"]

    play(scene)


def test_a_client_that_says_nothing_is_dropped():
    async def scene(client: Transport, reception: Reception) -> None:
        stream = await client.open("server")
        await asyncio.sleep(IDLE_SECONDS / 2)
        assert reception.num_streams == 1
        await asyncio.sleep(IDLE_SECONDS)
        assert reception.num_streams == 0
        await until_it_ends(stream)

    play(scene)


def test_nonsense_is_refused():
    async def scene(client: Transport, _: Reception) -> None:
        stream = await client.open("server")
        await stream.send(b"{}")
        answer, _ = await codec.receive(stream)
        assert isinstance(answer, Failure)
        assert answer.code == "rejected"

    play(scene)
