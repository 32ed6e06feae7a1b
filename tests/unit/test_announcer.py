"""How a server keeps its record fresh, and takes it back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace

import pytest

from shoal.errors import SwarmError
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.server.announcer import GOODBYE_SECONDS, Announcer

from . import virtual_time
from .test_routing import server

MODEL = ModelInfo("tiny-8x64-00000000", "tiny", "llama", 8)
EVERY_SECONDS = 20.0


@dataclass
class Table:
    """A directory that keeps what it is told, as long as nothing is wrong with it."""

    states: list[ServerState] = field(default_factory=list)
    answers: bool = True
    moves: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.moves.set()

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        if not self.answers:
            raise SwarmError("the directory does not answer")
        await self.moves.wait()
        self.states.append(info.state)


def presence_of(table: Table, peer: str = "s0") -> Announcer:
    node = Node(MemoryNetwork().node(peer).transport, table)  # type: ignore[arg-type]
    return Announcer(node, MODEL, replace(server(peer, "0:8"), state=ServerState.JOINING), every_seconds=EVERY_SECONDS)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_servers_that_leave_together_do_not_wait_for_each_other() -> None:
    async def leave() -> float:
        tables = [Table() for _ in range(6)]
        presences = [await presence_of(table, f"s{index}").__aenter__() for index, table in enumerate(tables)]
        for table in tables:
            table.moves.clear()  # each waits for others, who are gone
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(presence.leave() for presence in presences))
        return asyncio.get_running_loop().time() - began

    assert virtual_time.run(leave()) <= GOODBYE_SECONDS


def test_a_goodbye_comes_last_also_while_a_renewal_is_under_way() -> None:
    table = Table()

    async def leave() -> None:
        async with presence_of(table) as presence:
            table.moves.clear()
            presence.announce_soon()
            await asyncio.sleep(0.1)
            table.moves.set()
            await presence.leave()
            await asyncio.sleep(10 * EVERY_SECONDS)

    virtual_time.run(leave())
    assert table.states == [ServerState.JOINING, ServerState.LEAVING]


def test_no_announcement_overtakes_another() -> None:
    table = Table()

    async def set_description() -> None:
        async with presence_of(table) as presence:
            table.moves.clear()
            presence.announce_soon()
            await asyncio.sleep(0.1)  # the renewal says that it joins, and is stuck

            async def let_go() -> None:
                await asyncio.sleep(0.1)
                table.moves.set()

            await asyncio.gather(presence.set_description(lambda: server("s0", "0:8")), let_go())

    virtual_time.run(set_description())
    assert table.states == [ServerState.JOINING, ServerState.JOINING, ServerState.ONLINE, ServerState.LEAVING]


def test_a_directory_that_is_away_is_told_of_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()

    async def serve() -> None:
        async with presence_of(table):
            for answers in False, True, False:
                table.answers = answers
                await asyncio.sleep(10 * EVERY_SECONDS)

    virtual_time.run(serve())
    assert [line.partition(" that this")[0] for line in warnings(caplog)] == [
        "the swarm could not be told",
        "the swarm is told again",
        "the swarm could not be told",
    ]
