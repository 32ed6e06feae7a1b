"""A server notices that another one is gone, long before that one's record expires."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from shoal.net.memory import MemoryNetwork
from shoal.server.placing.peer_watch import PING_SECONDS, PONG_SECONDS, PeerWatch
from shoal.server.rpc.reception import Reception

from . import virtual_time
from .test_routing import server

PEERS = ("a", "b", "c")


class Scene:
    """Peers "a", "b" and "c", which answer pings, and one that watches them."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.changes: list[float] = []
        self.nodes = {peer: self.network.node(peer) for peer in (*PEERS, "watcher")}
        self.watch = PeerWatch(self.nodes["watcher"].transport, on_change=self._note)

    def _note(self) -> None:
        self.changes.append(self.now)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def watching(self, *peers: str) -> AsyncIterator[None]:
        for peer in PEERS:
            await self.nodes[peer].transport.listen(Reception(idle_seconds=300.0))
        async with self.watch.running():
            self.watch.watch([server(peer, "0:4") for peer in peers])
            await asyncio.sleep(1)
            yield
        for node in self.nodes.values():
            await node.transport.close()


def play(scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        await scene(Scene())

    virtual_time.run(run())


def test_a_server_that_is_killed_is_missed_within_a_second():
    async def scene(at: Scene) -> None:
        async with at.watching(*PEERS):
            assert not at.watch.gone
            at.network.kill("b")
            await asyncio.sleep(1)
            assert at.watch.gone == {"b"}
            assert len(at.changes) == 1

    play(scene)


def test_a_server_that_hangs_is_missed_after_a_few_pings_and_counts_again_when_it_answers():
    async def scene(at: Scene) -> None:
        async with at.watching(*PEERS):
            at.network.hang("b")
            await asyncio.sleep(PING_SECONDS + 2 * PONG_SECONDS + 1)
            assert at.watch.gone == {"b"}
            at.network.heal("b")
            await asyncio.sleep(2 * PING_SECONDS)
            assert not at.watch.gone
            assert len(at.changes) == 2

    play(scene)


def test_a_stream_that_breaks_is_no_death():
    async def scene(at: Scene) -> None:
        async with at.watching(*PEERS):
            for _ in range(5):
                at.network.disconnect("b")
                await asyncio.sleep(1)
            assert not at.watch.gone
            assert not at.changes

    play(scene)


def test_a_server_that_never_answered_is_not_gone():
    async def scene(at: Scene) -> None:
        at.network.cut("watcher", "b")
        async with at.watching(*PEERS):
            await asyncio.sleep(100)
            assert not at.watch.gone

    play(scene)


def test_a_server_without_a_network_misses_nobody():
    async def scene(at: Scene) -> None:
        async with at.watching(*PEERS):
            at.network.cut("watcher")
            await asyncio.sleep(100)
            assert not at.watch.gone
            at.network.heal()
            await asyncio.sleep(100)
            assert not at.watch.gone

    play(scene)


def test_what_is_not_watched_any_more_is_forgotten():
    async def scene(at: Scene) -> None:
        async with at.watching(*PEERS):
            at.network.kill("b")
            await asyncio.sleep(1)
            at.watch.watch([server("a", "0:4")])
            await asyncio.sleep(1)
            assert not at.watch.gone
            assert at.network.num_streams("watcher") == 1

    play(scene)


def test_a_server_that_was_lost_before_any_other_answered_is_gone_once_one_does():
    async def scene(at: Scene) -> None:
        at.network.cut("watcher", "a")
        async with at.watching("a", "b"):
            at.network.kill("b")
            await asyncio.sleep(20)
            assert not at.changes, "this server may have lost its own network"
            at.network.heal("watcher", "a")
            await asyncio.sleep(5)
            assert at.watch.gone == {"b"}
            assert len(at.changes) == 1

    play(scene)
