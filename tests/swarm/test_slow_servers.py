"""A server that becomes slow is left for one that is not: the slower, the sooner. In virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pytest

from shoal.client.decoding.session import Session
from shoal.peers import ModelInfo, ServerInfo
from shoal.spans import Span

from .schedules.bed import PASS_SECONDS, PATIENT, Bed, Member
from .schedules.work import Reading, prompt
from .virtual_time import run

MAX_TOKENS = 256
NUM_TOKENS = 24
"""How many tokens a session has when one of its servers becomes slow."""


@dataclass(frozen=True)
class Left:
    """After how many more tokens, and how many seconds, a session has left the slow server."""

    num_tokens: int
    seconds: float


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No log lines: there are too many."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def left_after(step_seconds: float, *spans: str, hop: int = 0, slower: str | None = None) -> Left:
    """One of a session's servers takes `step_seconds` for each step from some moment on. Its tokens stay right.

    A server with the span `slower` announces that it takes two seconds.
    """

    async def scene() -> Left:
        async with Bed(spans, cache_pages=160, drain_seconds=0.0) as bed:
            if slower is not None:
                bed.start(Span.parse(slower), speed=0.5)
            client = bed.client("client0", PATIENT)
            session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_TOKENS)
            text = Reading(client, session, 1)
            token = await text.say(await text.read(prompt(1, 5)), NUM_TOKENS - 5)
            victim = session.hops[hop].server.peer
            (slow,) = (member for member in bed.members if member.name == victim)
            slow.executor.slowness = step_seconds / PASS_SECONDS
            began = asyncio.get_running_loop().time()
            while victim in {each.server.peer for each in session.hops}:
                assert text.num_tokens < MAX_TOKENS, "the slow server is never left"
                token = await text.read(token)
            left = Left(text.num_tokens - NUM_TOKENS, asyncio.get_running_loop().time() - began)
            slow.executor.recover()
            await session.close()
            await client.close()
            return left

    return run(scene())


def test_the_slower_a_server_becomes_the_sooner_it_is_left():
    found = [left_after(seconds, "0:2", "2:4", "0:2") for seconds in (0.1, 0.3, 1.0, 3.0, 10.0)]
    assert [each.num_tokens for each in found] == sorted((each.num_tokens for each in found), reverse=True)
    assert found[0].num_tokens <= 64
    assert max(each.seconds for each in found) <= 60


def test_a_server_that_becomes_very_slow_is_left_for_one_that_was_always_slow():
    assert left_after(10.0, "0:2", "2:4", slower="0:2").num_tokens <= 32


@pytest.mark.parametrize("hop", [0, 2])
def test_a_long_route_is_as_soon_rid_of_a_slow_server_as_a_short_one(hop: int):
    route = ("0:1", "1:2", "2:3", "3:4")
    short = left_after(1.0, "0:2", "2:4", "0:2")
    assert left_after(1.0, *route, route[hop], hop=hop).num_tokens <= short.num_tokens


def test_a_server_that_is_overtaken_during_a_look_for_better_ones_does_not_end_the_upkeep_of_the_session():
    async def scene() -> None:
        async with Bed(["0:2", "2:4", "2:4", "2:4"], cache_pages=160, drain_seconds=0.0) as bed:
            client = bed.client("client0", PATIENT)
            directory = client.swarm.node.directory
            read, looking, may_read = directory.servers, asyncio.Event(), asyncio.Event()

            async def read_late(model: ModelInfo, *, blocks: Collection[int] = ()) -> Sequence[ServerInfo]:
                looking.set()
                await may_read.wait()
                return await read(model, blocks=blocks)

            def second() -> Member:
                return next(each for each in bed.members if each.name == session.hops[1].server.peer)

            session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_TOKENS)
            text = Reading(client, session, 1)
            token = await text.read(prompt(1, 5))
            bed.members[0].executor.slowness = 2.0  # it is looked at first
            directory.servers = read_late  # type: ignore[method-assign]
            while not looking.is_set():
                token = await text.read(token)
            frozen = second()
            frozen.executor.thawed.clear()
            token = await text.read(token)
            assert second() is not frozen
            may_read.set()
            await asyncio.sleep(1.0)
            bed.kill(second())
            await asyncio.sleep(1.0)
            assert second().alive  # it was replaced between two steps
            await text.read(token)
            frozen.executor.recover()
            await session.close()
            await client.close()

    run(scene())
