"""How a server renews its record, and announces that it leaves."""

from __future__ import annotations

import asyncio
import contextlib
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
    """A directory that records states, unless it does not answer or does not move."""

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


def announcer_of(table: Table, peer: str = "s0") -> Announcer:
    node = Node(MemoryNetwork().node(peer).transport, table)  # type: ignore[arg-type]
    return Announcer(node, MODEL, replace(server(peer, "0:8"), state=ServerState.JOINING), every_seconds=EVERY_SECONDS)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_servers_that_leave_together_do_not_wait_for_each_other() -> None:
    async def leave_together() -> float:
        tables = [Table() for _ in range(6)]
        async with contextlib.AsyncExitStack() as stack:
            announcers = [announcer_of(table, f"s{index}").announcing() for index, table in enumerate(tables)]
            entered = [await stack.enter_async_context(announcer) for announcer in announcers]
            for table in tables:
                table.moves.clear()  # each waits for the others, which are gone
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(announcer.leave() for announcer in entered))
            return asyncio.get_running_loop().time() - began

    assert virtual_time.run(leave_together()) <= GOODBYE_SECONDS


def test_the_last_announcement_is_that_the_server_leaves_even_while_a_renewal_is_in_flight() -> None:
    table = Table()

    async def leave() -> None:
        async with announcer_of(table).announcing() as announcer:
            table.moves.clear()
            announcer.announce_soon()
            await asyncio.sleep(0.1)
            table.moves.set()
            await announcer.leave()
            await asyncio.sleep(10 * EVERY_SECONDS)

    virtual_time.run(leave())
    assert table.states == [ServerState.JOINING, ServerState.LEAVING]


def test_no_announcement_overtakes_another() -> None:
    table = Table()

    async def change_description() -> None:
        async with announcer_of(table).announcing() as announcer:
            table.moves.clear()
            announcer.announce_soon()
            await asyncio.sleep(0.1)  # the renewal says that it joins, and is stuck

            async def move_on() -> None:
                await asyncio.sleep(0.1)
                table.moves.set()

            announcer.describe_by(lambda: server("s0", "0:8"))
            await asyncio.gather(announcer.announce_now(), move_on())

    virtual_time.run(change_description())
    assert table.states == [ServerState.JOINING, ServerState.JOINING, ServerState.ONLINE, ServerState.LEAVING]


def test_a_directory_that_does_not_answer_is_logged_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()

    async def serve() -> None:
        async with announcer_of(table).announcing():
            for answers in False, True, False:
                table.answers = answers
                await asyncio.sleep(10 * EVERY_SECONDS)

    virtual_time.run(serve())
    assert [line.partition(" that it")[0] for line in warnings(caplog)] == [
        "the server could not announce",
        "the server can announce again",
        "the server could not announce",
    ]


def test_after_the_server_has_left_nothing_more_is_announced() -> None:
    table = Table()

    async def leave() -> None:
        async with announcer_of(table).announcing() as announcer:
            assert await announcer.announce_now()
            await announcer.leave()
            assert not await announcer.announce_now()

    virtual_time.run(leave())
    assert table.states == [ServerState.JOINING, ServerState.JOINING, ServerState.LEAVING]


def test_the_server_is_told_whether_the_directory_took_its_announcement() -> None:
    table = Table()

    async def announce() -> None:
        async with announcer_of(table).announcing() as announcer:
            for answers in True, False, True:
                table.answers = answers
                assert await announcer.announce_now() == answers

    virtual_time.run(announce())
