"""Connections for single passes, and the adapters that servers are sent over them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from shoal.adapters import Prompt
from shoal.client.swarm.adapter_sync import MAX_ADAPTER_UPLOADS, AdapterSync
from shoal.client.training.connection_pool import IDLE_SECONDS, ConnectionPool
from shoal.errors import Misrouted, PeerError, ServerLost
from shoal.model.peft.factors import AdapterFactors, factors_name
from shoal.protocol import Adapter, AdapterStored, AnyMessage, Forward, NotCached, PassResult

from . import virtual_time
from .test_connection import SERVER

ASKED = Forward(model="", fingerprint="", start=0, end=1)


def version(number: int, *, origin: int = 1, block: int = 0) -> AdapterFactors:
    """The factors of some origin at some moment."""
    layers, values = (Prompt(num_tokens=1),), torch.full((4,), float(number))
    return AdapterFactors(factors_name(block, layers, values), block, layers, values, origin)


@dataclass(eq=False)
class Server:
    """Stores adapters, answers, and drops adapters when it is told to."""

    peer: str = "server"
    known: set[str] = field(default_factory=set)
    uploads: list[Adapter] = field(default_factory=list)
    num_connected: int = 0
    connections: list[Connection] = field(default_factory=list)
    forgetful: bool = False
    fails: bool = False
    seconds_to_close: float = 0.0

    async def connect(self, _: object) -> Any:
        self.num_connected += 1
        self.connections.append(Connection(self))
        return self.connections[-1]


@dataclass(eq=False)
class Connection:
    server: Server
    error: PeerError | None = None
    is_closed: bool = False
    is_busy: bool = False

    @property
    def peer(self) -> str:
        return self.server.peer

    async def ask_all(self, questions: Sequence[tuple[AnyMessage, Any]], **_: Any) -> list[Any]:
        await asyncio.sleep(1)
        for message, tensors in questions:
            assert isinstance(message, Adapter)
            self.server.uploads.append(message)
            if self.server.fails:
                raise ServerLost("gone", peer=self.peer)
            if message.replaces is not None:
                self.server.known.discard(message.replaces)
            self.server.known.add(factors_name(message.block, message.layers, tensors["factors"]))
        return [(AdapterStored(), {})] * len(questions)

    async def ask(self, request: Any, tensors: Any, **_: Any) -> Any:
        assert not self.is_busy
        self.is_busy = True
        await asyncio.sleep(1)
        self.is_busy = False
        if self.server.forgetful:
            self.server.known.clear()
        wanted = tuple(name for name in request.adapters if name is not None and name not in self.server.known)
        return (NotCached(adapters=wanted) if wanted else PassResult()), {}

    async def close(self) -> None:
        await asyncio.sleep(self.server.seconds_to_close)
        self.is_closed = True


async def ask(pool: ConnectionPool, *adapters: AdapterFactors, to: str = SERVER.peer) -> Any:
    names = tuple(each.name for each in adapters)
    request = ASKED.model_copy(update={"adapters": names})
    _, reply, _ = await pool.ask(replace(SERVER, peer=to), request, {}, adapters, usual_seconds=1.0)
    return reply


def test_a_version_is_sent_once_and_takes_the_place_of_the_one_before():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            for number in (0, 0, 1, 1):
                assert isinstance(await ask(pool, version(number)), PassResult)
            assert [each.replaces for each in server.uploads] == [None, version(0).name]
            assert server.known == {version(1).name}

    virtual_time.run(scene())


def test_two_passes_that_need_the_same_adapter_send_it_once():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            await asyncio.gather(*(ask(pool, version(0)) for _ in range(3)))
            assert len(server.uploads) == 1
            assert server.num_connected == 3

    virtual_time.run(scene())


def test_adapters_of_the_same_block_that_are_not_versions_of_each_other_are_both_kept():
    async def scene() -> None:
        server, adapter_sync = Server(), AdapterSync()
        async with ConnectionPool(server.connect, adapter_sync) as pool:
            for _ in range(2):
                await ask(pool, version(0, origin=1))
                await ask(pool, version(1, origin=2))
            assert [each.replaces for each in server.uploads] == [None, None]

    virtual_time.run(scene())


def test_a_session_keeps_its_version_while_passes_go_on():
    async def scene() -> None:
        server, adapter_sync = Server(), AdapterSync()
        connection = Connection(server)
        async with ConnectionPool(server.connect, adapter_sync) as pool:
            await ask(pool, version(1))
            for number in (2, 3):
                await adapter_sync.ensure_loaded(connection, SERVER, [version(0)], session=True)
                await ask(pool, version(number))
                assert server.known == {version(0).name, version(number).name}
            assert [each.replaces for each in server.uploads] == [None, None, version(1).name, version(2).name]

    virtual_time.run(scene())


def test_a_session_with_a_version_that_passes_leave_has_it_sent_again():
    async def scene() -> None:
        server, adapter_sync = Server(), AdapterSync()
        connection = Connection(server)
        async with ConnectionPool(server.connect, adapter_sync) as pool:
            await adapter_sync.ensure_loaded(connection, SERVER, [version(0)], session=True)
            await ask(pool, version(0))
            await ask(pool, version(1))
            for _ in range(2):
                await adapter_sync.ensure_loaded(connection, SERVER, [version(0)], session=True)
                assert server.known == {version(0).name, version(1).name}
            assert len(server.uploads) == 4

    virtual_time.run(scene())


def test_a_server_can_miss_only_adapters_that_it_was_requested_to_use():
    async def scene() -> None:
        server, adapter_sync = Server(), AdapterSync()
        hosting = replace(SERVER, adapters=("a" * 16,))
        hosted, own = (replace(version(number), hosted="a" * 16) for number in (0, 1))
        for number in range(9):
            adapter_sync.forget(SERVER.peer, [hosted, version(2)], [own.name, version(2).name, f"{number:032x}"])
        await adapter_sync.ensure_loaded(Connection(server), hosting, [hosted, own])
        assert not server.uploads
        adapter_sync.forget(SERVER.peer, [hosted, own], [own.name])
        await adapter_sync.ensure_loaded(Connection(server), hosting, [hosted, own])
        assert server.known == {own.name}

    virtual_time.run(scene())


def test_an_adapter_that_a_server_has_dropped_is_sent_again():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            await ask(pool, version(0))
            server.known.clear()
            assert isinstance(await ask(pool, version(0)), PassResult)
            assert len(server.uploads) == 2

    virtual_time.run(scene())


def test_a_server_that_always_drops_adapters_is_not_asked_again():
    async def scene() -> None:
        server = Server(forgetful=True)
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            with pytest.raises(Misrouted, match="server has no room for these adapters"):
                await ask(pool, version(0))
            assert len(server.uploads) == MAX_ADAPTER_UPLOADS
            assert all(each.is_closed for each in server.connections)

    virtual_time.run(scene())


def test_an_upload_that_failed_is_repeated():
    async def scene() -> None:
        server = Server(fails=True)
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            with pytest.raises(ServerLost):
                await ask(pool, version(0))
            server.fails = False
            assert isinstance(await ask(pool, version(0)), PassResult)
            assert len(server.uploads) == 2

    virtual_time.run(scene())


def test_a_connection_is_used_again_until_it_fails_or_has_been_idle_for_long():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            await ask(pool)
            await ask(pool)
            assert server.num_connected == 1
            server.connections[0].error = ServerLost("gone", peer="server")
            await ask(pool)
            assert server.num_connected == 2
            assert server.connections[0].is_closed
            await asyncio.sleep(2 * IDLE_SECONDS)
            assert server.connections[1].is_closed
            await ask(pool)
            assert server.num_connected == 3
        assert server.connections[2].is_closed

    virtual_time.run(scene())


def test_connections_are_closed_while_others_are_taken_and_given_back():
    async def scene() -> None:
        slow, other = Server(seconds_to_close=5.0), Server(peer="other")
        servers = {each.peer: each for each in (slow, other)}
        async with ConnectionPool(lambda info: servers[info.peer].connect(info), AdapterSync()) as pool:
            await asyncio.gather(*(ask(pool) for _ in range(3)))
            await asyncio.sleep(IDLE_SECONDS * 5 / 4 + 2)  # the first of the three is being closed
            assert [each.is_closed for each in slow.connections] == [False, False, False]
            await asyncio.gather(ask(pool), ask(pool, to="other"))
            assert slow.num_connected == 4
            await asyncio.sleep(2 * IDLE_SECONDS)
            assert all(each.is_closed for each in slow.connections + other.connections)

    virtual_time.run(scene())


def test_a_connection_is_closed_if_its_request_is_cancelled():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            asking = asyncio.create_task(ask(pool))
            await asyncio.sleep(0.5)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert server.connections[0].is_closed
            await ask(pool)
            assert server.num_connected == 2

    virtual_time.run(scene())


def test_a_connection_in_use_is_closed_after_its_pass_if_the_pool_is_closed():
    async def scene() -> None:
        server = Server()
        async with ConnectionPool(server.connect, AdapterSync()) as pool:
            asking = asyncio.create_task(ask(pool))
            await asyncio.sleep(0.5)
        assert isinstance(await asking, PassResult)
        assert server.connections[0].is_closed

    virtual_time.run(scene())
