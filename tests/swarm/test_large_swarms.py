"""The directory of swarms that no peer can read whole, in virtual time: announcing, reading, routes and histograms."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.swarm import Swarm
from shoal.errors import MissingBlocks
from shoal.net.memory import MemoryNetwork
from shoal.net.memory.memory_directory import MemoryDirectory
from shoal.net.transport import Directory
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.census.levels import MAX_LEVEL, MOST, bucket_of, level_for
from shoal.policy.routing.route import Needs
from shoal.server.announcer import Announcer
from shoal.spans import Span

from .test_liars import SERVER
from .virtual_time import run

MODEL = ModelInfo("key", "org/model", "llama", 16)
ALL = Span(0, 16)
EVERY = 20.0
MINUTE = 60.0
TRUSTING = ClientOptions(measure_seconds=0.0, patience_seconds=0.0)


def info(peer: str, span: str, **changes: object) -> ServerInfo:
    return replace(SERVER, peer=peer, span=Span.parse(span), **changes)  # type: ignore[arg-type]


@dataclass
class Member:
    """A server that announces itself and reads the directory, and does nothing else."""

    directory: Directory
    announcer: Announcer
    read_every: float

    async def live(self) -> None:
        await self.directory.servers(MODEL)
        async with self.announcer.announcing():
            while True:
                await asyncio.sleep(self.read_every)
                await self.directory.servers(MODEL)


@asynccontextmanager
async def members(
    network: MemoryNetwork, infos: Iterable[ServerInfo], *, pause: float, read_every: float = EVERY
) -> AsyncIterator[None]:
    """Servers that join one after the other, with a pause in between, and leave together."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for each in infos:
            node = network.node(each.peer)
            member = Member(node.directory, Announcer(node, MODEL, each, every_seconds=EVERY), read_every)
            tasks.append(group.create_task(member.live()))
            await asyncio.sleep(pause)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


def crowd(number: int, *, prefix: str = "s") -> list[ServerInfo]:
    return [info(f"{prefix}{index}", "0:10" if index % 2 else "6:16") for index in range(number)]


def publish(network: MemoryNetwork, infos: list[ServerInfo], *, level: int | None = None) -> None:
    """Servers that are in the directory for an hour, at the level that suits their number."""
    for each in infos:
        number = sum(bucket_of(other.span.start) == bucket_of(each.span.start) for other in infos[:200]) / 200
        suits = level_for(number * len(infos), None)
        network.publish(each.peer, MODEL, each, 3600.0, level=suits if level is None else level)


def play(act: Callable[[MemoryNetwork], Awaitable[None]]) -> None:
    async def scene() -> None:
        network = MemoryNetwork()
        try:
            await act(network)
        finally:
            await network.close()

    random.seed(0)
    run(scene())


def names(servers: Iterable[ServerInfo]) -> set[str]:
    return {each.peer for each in servers}


def test_while_a_swarm_grows_from_one_shard_to_several_a_reader_sees_every_server():
    async def act(network: MemoryNetwork) -> None:
        reader = network.node("reader", is_client=True).directory
        async with members(network, crowd(60), pause=0.1):
            assert names(await reader.servers(MODEL)) == names(crowd(60))
            async with members(network, crowd(200, prefix="t"), pause=1.0):
                for _ in range(6):
                    await asyncio.sleep(EVERY)
                    found = names(await reader.servers(MODEL))
                    assert found >= names([*crowd(60), *crowd(200, prefix="t")])
        levels = {record.level for record in network.records}
        assert max(levels) >= 1, "or the scene shows nothing"

    play(act)


def test_a_new_server_of_a_small_swarm_is_seen_in_the_next_read_and_a_lost_one_is_gone_after_a_minute():
    async def act(network: MemoryNetwork) -> None:
        reader = network.node("reader", is_client=True).directory
        async with members(network, crowd(40), pause=0.1):
            await reader.servers(MODEL)
            async with members(network, [info("new", "0:16")], pause=0.1):
                assert "new" in names(await reader.servers(MODEL))
                network.kill("new")
            await asyncio.sleep(MINUTE + 1)
            assert names(await reader.servers(MODEL)) == names(crowd(40))

    play(act)


def test_in_a_large_swarm_clients_and_servers_read_no_more_than_they_may():
    async def act(network: MemoryNetwork) -> None:
        client = network.node("client", is_client=True).directory
        assert isinstance(client, MemoryDirectory)
        server = network.node("server").directory
        assert isinstance(server, MemoryDirectory)
        publish(network, crowd(6000))
        for directory, most in (client, 2e6), (server, 1e6):
            for _ in range(3):
                await directory.histogram(MODEL)
                await asyncio.sleep(EVERY)
            before = directory.bytes_received
            for _ in range(30):
                await directory.histogram(MODEL)
                await asyncio.sleep(EVERY)
            assert (directory.bytes_received - before) / 10 <= most

    play(act)


def test_servers_of_a_crowded_bucket_agree_on_levels_renew_rarely_and_report_on_their_shards():
    async def act(network: MemoryNetwork) -> None:
        asked = network.node("asked").directory
        async with members(network, crowd(500), pause=0.2, read_every=MINUTE):
            await asyncio.sleep(2 * MINUTE)
            levels = {record.level for record in network.records}
            assert max(levels) - min(levels) <= 1
            assert min(levels) >= 2
            assert 500 / (1 << max(levels)) <= MOST
            renewed = {record.info.peer: record.version for record in network.records}
            await asyncio.sleep(MINUTE)
            again = {record.info.peer for record in network.records if renewed[record.info.peer] != record.version}
            assert len(again) <= 420, "each renews its record every 100 seconds"
            found = await asked.histogram(MODEL)
            for _ in range(6):
                await asyncio.sleep(EVERY)
                found = await asked.histogram(MODEL)
            assert not found.exact
            assert found.holders(16) == pytest.approx([250] * 6 + [500] * 4 + [250] * 6, rel=0.1)

    play(act)


def test_a_client_of_a_large_swarm_keeps_a_thousand_servers_and_finds_the_only_holder_of_a_block():
    async def act(network: MemoryNetwork) -> None:
        publish(network, [*(info(f"s{index}", "0:8") for index in range(4000)), info("only", "5:16")])
        swarm = Swarm(network.node("client", is_client=True), MODEL, "f", TRUSTING)
        route = await swarm.route(ALL, needs=Needs())
        assert route.hops[-1].server.peer == "only"
        for _ in range(15):
            await asyncio.sleep(EVERY)
            route = await swarm.route(ALL, needs=Needs())
            assert route.hops[-1].server.peer == "only"
        assert 990 <= await swarm.servers.num_servers(ALL) <= 1000

    play(act)


def test_a_block_that_no_server_of_a_large_swarm_holds_is_missing():
    async def act(network: MemoryNetwork) -> None:
        publish(network, [info(f"s{index}", "0:8" if index % 2 else "9:16") for index in range(4000)])
        client = network.node("client", is_client=True)
        swarm = Swarm(client, MODEL, "f", TRUSTING)
        with pytest.raises(MissingBlocks, match="8:9"):
            await swarm.route(ALL, needs=Needs())
        assert isinstance(client.directory, MemoryDirectory)
        for _ in range(20):
            with pytest.raises(MissingBlocks):
                await swarm.route(ALL, needs=Needs())
        assert client.directory.bytes_received <= 10e6, "the search does not go on for ever"

    play(act)


def test_two_thousand_who_claim_another_level_take_no_blocks_from_a_client():
    async def act(network: MemoryNetwork) -> None:
        publish(network, crowd(4000))
        publish(network, [info(f"liar{index}", "0:8") for index in range(2000)], level=MAX_LEVEL)
        directory = network.node("client", is_client=True).directory
        for _ in range(30):
            found = await directory.servers(MODEL)
            honest = [each for each in found if each.peer.startswith("s")]
            assert all(any(block in each.span for each in honest) for block in ALL)
            await asyncio.sleep(EVERY)
        assert len(honest) >= 1000

    play(act)
