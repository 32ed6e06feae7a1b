"""Servers that announce everything and answer nothing, in virtual time: no route goes over them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.swarm import Swarm
from shoal.errors import MissingBlocks, ServerLost
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.routing.route import Needs
from shoal.protocol import Ping, Pong
from shoal.spans import Span

from .virtual_time import run

MODEL = ModelInfo("key", "org/model", "llama", 8)
ALL = Span(0, 8)
SERVER = ServerInfo(
    peer="",
    span=ALL,
    state=ServerState.ONLINE,
    fingerprint="f",
    decode_speed=10.0,
    prefill_speed=100.0,
    cache_tokens_left=10_000,
    dtype="float32",
    quantization="none",
    version="0",
)

Behaviour = Callable[[Stream], Awaitable[None]]


async def honest(stream: Stream) -> None:
    try:
        while isinstance((await codec.receive(stream))[0], Ping):
            await codec.send(stream, Pong())
    except StreamBroken:
        pass


async def silent(stream: Stream) -> None:
    await asyncio.Event().wait()


class Scene:
    """A network, servers that are announced in it, and one client."""

    def __init__(self, config: ClientOptions | None = None) -> None:
        self.network = MemoryNetwork()
        self.network.delay(0.02)
        self.swarm = Swarm(self.network.node("client"), MODEL, "f", config or ClientOptions())

    async def server(self, peer: str, span: str, speed: float, behaviour: Behaviour) -> None:
        node = self.network.node(peer)
        await node.transport.listen(behaviour)
        info = replace(SERVER, peer=peer, span=Span.parse(span), decode_speed=speed, prefill_speed=speed)
        await node.directory.announce(MODEL, info, lifetime=300.0)

    async def liars(self, number: int, span: str = "0:8") -> None:
        for index in range(number):
            await self.server(f"liar{index}", span, 1e9, silent)

    async def route(self) -> list[str]:
        """The peers of the best route for a token."""
        return [hop.server.peer for hop in (await self.swarm.route(ALL, needs=Needs())).hops]

    async def close(self) -> None:
        await self.network.close()


def play(act: Callable[[Scene], Awaitable[None]], config: ClientOptions | None = None) -> None:
    async def scene() -> None:
        here = Scene(config)
        try:
            await act(here)
        finally:
            await here.close()

    run(scene())


def seconds() -> float:
    return asyncio.get_running_loop().time()


def test_three_hundred_that_claim_to_be_the_fastest_and_say_nothing_are_in_no_route():
    async def act(scene: Scene) -> None:
        await scene.server("first", "0:4", 10.0, honest)
        await scene.server("last", "4:8", 10.0, honest)
        await scene.liars(300)
        began = seconds()
        assert await scene.route() == ["first", "last"]
        assert seconds() - began < 2.0
        for _ in range(3):  # and later, with a new view each time
            await asyncio.sleep(30.0)
            began = seconds()
            assert await scene.route() == ["first", "last"]
            assert seconds() - began <= 1.1

    play(act)


def test_a_server_is_used_whose_first_connection_takes_many_seconds_if_no_other_answers():
    async def late(stream: Stream) -> None:
        await asyncio.sleep(1.5)
        await honest(stream)

    async def act(scene: Scene) -> None:
        await scene.server("relayed", "0:8", 10.0, late)
        await scene.liars(20)
        assert await scene.route() == ["relayed"]

    play(act)


def test_if_all_servers_of_a_block_are_silent_there_is_no_route_and_the_error_says_why():
    async def act(scene: Scene) -> None:
        await scene.server("honest", "0:4", 10.0, honest)
        await scene.liars(3, "0:8")

        async def ask(excluded: object) -> list[str]:
            return await scene.route()

        with pytest.raises(MissingBlocks, match="3 servers were asked and did not answer"):
            await scene.swarm.with_failover(ALL, ask)

    play(act, ClientOptions(patience_seconds=20.0))


def test_where_there_is_no_choice_the_only_server_is_not_pinged_first():
    async def act(scene: Scene) -> None:
        await scene.liars(1, "0:8")
        began = seconds()
        assert await scene.route() == ["liar0"]
        assert seconds() - began < 0.1

    play(act)


def test_a_server_that_answered_and_was_lost_has_to_answer_again():
    async def act(scene: Scene) -> None:
        await scene.server("a", "0:8", 1000.0, honest)
        await scene.server("b", "0:8", 10.0, honest)
        assert await scene.route() == ["a"]
        scene.network.hang("a")
        scene.swarm.servers.blame(ServerLost("a is lost", peer="a"))
        assert await scene.route() == ["b"]
        await asyncio.sleep(60.0)  # it is not deprioritized any more, and still silent
        assert await scene.route() == ["b"]
        scene.network.heal("a")
        await asyncio.sleep(90.0)
        assert await scene.route() == ["a"]

    play(act)


def test_of_a_thousand_honest_servers_not_all_are_pinged():
    async def act(scene: Scene) -> None:
        asked: set[str] = set()

        async def noticing(stream: Stream) -> None:
            asked.add(str(id(stream)))
            await honest(stream)

        for index in range(1000):
            await scene.server(f"s{index}", "0:4" if index % 2 else "4:8", 10.0, noticing)
        assert len(await scene.route()) == 2
        assert len(asked) <= 32

    play(act)
