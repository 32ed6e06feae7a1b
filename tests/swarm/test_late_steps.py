"""A server that is late is overtaken by another one: the first answer counts. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from shoal.client.decoding.session import Session
from shoal.client.options.client_options import ClientOptions
from shoal.net.transport import Stream
from shoal.policy.lateness import LATE_SECONDS

from .schedules.bed import PASS_SECONDS, PATIENT, Bed, Client, Member
from .schedules.work import Reading, prompt
from .strangers import computes_nothing, liar, opens_nothing, says_nothing
from .virtual_time import run

MOST_SECONDS = 5.0
"""The longest that a client may wait for a token while there are honest servers for all blocks."""
FAST = ("0:2", "2:4")
RESERVES = ("0:2", "2:4")


pytestmark = pytest.mark.usefixtures("no_log_lines")


class Story:
    """A client's session in a bed of servers, and how long its steps take. Its outputs are compared with the oracle."""

    def __init__(self, bed: Bed, config: ClientOptions = PATIENT, *, name: str = "client0") -> None:
        self.bed = bed
        self.client: Client = bed.client(name, config)
        self.session = Session(self.client.swarm, self.client.span, batch_size=1, max_length=256)
        self.text = Reading(self.client, self.session, 1)

    def servers(self) -> list[str]:
        return [hop.server.peer for hop in self.session.hops]

    def member(self, hop: int) -> Member:
        """The server that computes a hop now."""
        (member,) = (each for each in self.bed.living if each.name == self.servers()[hop])
        return member

    async def begin(self, num_tokens: int = 5) -> None:
        """Read a prompt."""
        self.next = await self.text.read(prompt(1, num_tokens))

    async def step(self) -> float:
        """One more token; returns how long it took."""
        began = asyncio.get_running_loop().time()
        self.next = await self.text.read(self.next)
        return asyncio.get_running_loop().time() - began

    async def end(self) -> None:
        await self.session.close()
        self.client.check_streams()
        await self.client.close()


def play(
    act: Callable[[Story], Awaitable[None]],
    *spans: str,
    reserves: tuple[str, ...] = RESERVES,
    config: ClientOptions = PATIENT,
) -> None:
    async def scene() -> None:
        async with Bed(spans or FAST, reserves, cache_pages=160, drain_seconds=0.0) as bed:
            story = Story(bed, config)
            await act(story)
            for member in bed.members:
                member.executor.recover()
            await story.end()
        await bed.network.close()  # a liar's streams

    run(scene())


@pytest.mark.parametrize("hop", [0, 1])
@pytest.mark.parametrize("standby", [False, True])
def test_a_server_that_says_that_it_works_and_gives_nothing_is_overtaken(hop: int, standby: bool):
    async def act(story: Story) -> None:
        await story.begin()
        for _ in range(3):
            await story.step()
        victim = story.member(hop)
        victim.executor.thawed.clear()  # it answers pings, with "working"
        assert LATE_SECONDS <= await story.step() <= MOST_SECONDS
        assert victim.name not in story.servers()
        assert await story.step() < 1.0

    play(act, config=replace(PATIENT, standby=standby))


@pytest.mark.parametrize("hop", [0, 1])
def test_also_while_it_reads_the_prompt(hop: int):
    async def act(story: Story) -> None:
        victim = story.bed.members[hop]
        victim.executor.thawed.clear()
        began = asyncio.get_running_loop().time()
        await story.begin(40)
        assert asyncio.get_running_loop().time() - began <= MOST_SECONDS
        assert victim.name not in story.servers()

    play(act)


@pytest.mark.parametrize("behaviour", [opens_nothing, computes_nothing])
@pytest.mark.parametrize("span", ["0:4", "2:4"])
def test_a_server_that_answers_pings_and_nothing_else_costs_a_few_seconds_once(
    behaviour: Callable[[Stream], Awaitable[None]], span: str
):
    async def act(story: Story) -> None:
        await liar(story.bed, "liar", span, behaviour)
        began = asyncio.get_running_loop().time()
        await story.begin(40)
        assert asyncio.get_running_loop().time() - began <= MOST_SECONDS
        assert "liar" not in story.servers()
        assert max([await story.step() for _ in range(20)]) < 1.0

    play(act, reserves=())


@pytest.mark.parametrize("span", ["0:4", "0:2"])
def test_three_hundred_identities_that_say_nothing_do_not_delay_the_first_token(span: str):
    async def act(story: Story) -> None:
        for index in range(300):
            await liar(story.bed, f"liar{index}", span, says_nothing)
        began = asyncio.get_running_loop().time()
        await story.begin(40)
        assert asyncio.get_running_loop().time() - began <= 2.0
        assert max([await story.step() for _ in range(40)]) < 1.0

    play(act, reserves=())


@pytest.mark.parametrize("number", [1, 4, 40, 300])
@pytest.mark.parametrize("span", ["0:4", "0:2"])
@pytest.mark.parametrize("behaviour", [opens_nothing, computes_nothing])
def test_any_number_of_servers_that_do_nothing_delays_the_first_token_once(
    behaviour: Callable[[Stream], Awaitable[None]], span: str, number: int
):
    async def act(story: Story) -> None:
        for index in range(number):
            await liar(story.bed, f"liar{index}", span, behaviour)
        began = asyncio.get_running_loop().time()
        await story.begin(40)
        assert asyncio.get_running_loop().time() - began <= MOST_SECONDS
        assert max([await story.step() for _ in range(40)]) < 1.0
        other = Session(story.client.swarm, story.client.span, batch_size=1, max_length=64)
        began = asyncio.get_running_loop().time()
        await Reading(story.client, other, 1).read(prompt(1, 5))
        assert asyncio.get_running_loop().time() - began <= 1.0
        await other.close()

    play(act, reserves=())


def test_a_server_that_opens_late_and_before_all_others_is_kept():
    async def act(story: Story) -> None:
        await story.begin()
        before = story.servers()
        for server in before:
            story.bed.network.delay(0.7, server)
        for reserve in story.bed.members[2:]:
            story.bed.network.delay(2.0, reserve.name)
        other = Session(story.client.swarm, story.client.span, batch_size=1, max_length=64)
        await Reading(story.client, other, 1).read(prompt(1, 5))
        assert [hop.server.peer for hop in other.hops] == before
        assert not any(story.client.swarm.servers.is_avoided(server) for server in before)
        await other.close()

    play(act)


def test_a_server_that_opens_late_is_tried_last_and_is_not_taken_for_lost():
    async def act(story: Story) -> None:
        await liar(story.bed, "liar", "0:4", opens_nothing)
        await story.begin()
        assert story.client.swarm.servers.is_avoided("liar")
        assert not story.client.swarm.servers.is_lost("liar")

    play(act, reserves=())


def test_a_server_that_alone_has_its_blocks_may_open_late():
    async def act(story: Story) -> None:
        story.bed.network.delay(0.7, "s1")
        await story.begin()
        assert story.servers() == ["s0", "s1"]

    play(act, reserves=(), config=replace(PATIENT, measure_seconds=0.0))


def test_a_second_server_that_has_much_to_read_is_waited_for():
    """It is not taken for late, and no third one is asked meanwhile."""

    async def act(story: Story) -> None:
        reserves = story.bed.members[2:]
        await story.begin(40)
        await story.step()
        for reserve in reserves:  # they announce as much
            reserve.executor.slowness = 7.0 / PASS_SECONDS
        story.member(0).executor.thawed.clear()
        assert await story.step() == pytest.approx(LATE_SECONDS + 7.0, abs=0.5)
        assert sum(reserve.engine.num_passes for reserve in reserves) == 1

    # an audit would let a reserve compute too
    play(act, "0:2", "2:4", reserves=("0:2", "0:2"), config=replace(PATIENT, audits="off"))


def test_several_servers_with_other_cuts_overtake_one():
    async def act(story: Story) -> None:
        await story.begin(20)
        await story.step()
        story.member(0).executor.thawed.clear()
        assert await story.step() <= MOST_SECONDS
        assert story.servers() == ["s1", "s2", "s3"]

    play(act, "0:4", reserves=("0:1", "1:3", "3:4"))


def test_a_server_that_is_late_once_and_answers_first_stays():
    async def act(story: Story) -> None:
        await story.begin()
        await story.step()
        before, late = story.servers(), story.member(0)
        for reserve in story.bed.members[2:]:
            reserve.executor.slowness = 2.0 / PASS_SECONDS
        late.executor.slowness = (LATE_SECONDS + 1.0) / PASS_SECONDS
        assert await story.step() == pytest.approx(LATE_SECONDS + 1.0, abs=0.2)
        late.executor.recover()
        for _ in range(3):
            assert await story.step() < 1.0
        assert story.servers() == before
        assert not story.client.swarm.servers.is_avoided(late.name)

    play(act)


def test_a_server_that_is_late_again_and_again_is_left():
    async def act(story: Story) -> None:
        await story.begin()
        await story.step()
        late = story.member(0)
        for reserve in story.bed.members[2:]:
            reserve.executor.slowness = 2.0 / PASS_SECONDS
        for _ in range(2):
            late.executor.slowness = (LATE_SECONDS + 1.0) / PASS_SECONDS
            await story.step()
            late.executor.recover()
        await asyncio.sleep(30.0)  # a standby reads the history meanwhile
        assert late.name not in story.servers()

    play(act)


def test_the_only_server_of_its_blocks_is_waited_for():
    async def act(story: Story) -> None:
        await story.begin()
        late = story.member(0)
        late.executor.slowness = 20.0 / PASS_SECONDS
        assert await story.step() > 20.0
        assert story.servers() == ["s0", "s1"]

    play(act, reserves=())


def test_a_server_is_not_blamed_for_being_overtaken_once_and_is_avoided_after_the_second_time():
    async def act(story: Story) -> None:
        await story.begin()
        victim = story.member(0)
        victim.executor.thawed.clear()
        await story.step()
        assert not story.client.swarm.servers.is_avoided(victim.name)
        other = Session(story.client.swarm, story.client.span, batch_size=1, max_length=64)
        text = Reading(story.client, other, 1)
        began = asyncio.get_running_loop().time()
        await text.read(prompt(1, 5))
        assert LATE_SECONDS <= asyncio.get_running_loop().time() - began <= MOST_SECONDS
        assert story.client.swarm.servers.is_avoided(victim.name)
        await other.close()

    play(act)


def test_two_late_servers_in_a_row_are_both_overtaken():
    """The first second server is as slow: one more is asked."""

    async def act(story: Story) -> None:
        await story.begin()
        await story.step()
        story.member(0).executor.thawed.clear()
        (worse,) = (each for each in story.bed.members if each.name == "s2")
        worse.executor.thawed.clear()
        assert await story.step() <= 2 * LATE_SECONDS + 1.0
        assert story.servers() == ["s3", "s1"]

    play(act, "0:2", "2:4", reserves=("0:2", "0:2"))
