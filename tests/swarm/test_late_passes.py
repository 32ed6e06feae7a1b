"""A pass that is late is computed by another server too: the first answer counts. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from shoal.client.options.client_options import ClientOptions
from shoal.client.training.remote_passes import RemotePasses
from shoal.client.training.server_passes import NORMS_SECONDS
from shoal.concurrency import now
from shoal.net.memory import Frame
from shoal.net.transport import Stream
from shoal.policy.lateness import LATE_FACTOR, LATE_SECONDS, UNPROVEN_LATE_SECONDS
from shoal.spans import Span

from .parity import assert_equal
from .schedules.bed import PASS_SECONDS, Bed, Member
from .schedules.oracle import oracle
from .schedules.work import prompt
from .strangers import computes_nothing, liar, opens_nothing, says_nothing
from .test_pass_rings import OUTPUT_GRAD, Passes, equal, expected
from .virtual_time import run

PATIENT = ClientOptions(patience_seconds=200.0, audits="off")
MOST_SECONDS = 5.0
"""The longest that a client may wait for a pass, or its gradients, while there are honest servers for all blocks."""
FAST = ("0:2", "2:4")
RESERVES = ("0:2", "2:4")

pytestmark = pytest.mark.usefixtures("no_log_lines")


@dataclass
class Story:
    """A client that trains in a bed of servers, and how long its passes take. Its gradients are the right ones."""

    passes: Passes

    @property
    def bed(self) -> Bed:
        return self.passes.bed

    def is_avoided(self, peer: str) -> bool:
        return self.passes.client.swarm.servers.is_avoided(peer)

    async def step(self) -> float:
        """A forward and a backward pass; returns how long both took."""
        began = now()
        assert equal(await self.passes.gradients(), expected())
        return now() - began

    def num_asked(self) -> list[int]:
        """How many passes the client has asked of each server. Those that are pushed to it do not count."""
        receivers = [receiver for kind, _, receiver in self.passes.sent if kind in ("forward", "backward")]
        return [receivers.count(member.name) for member in self.bed.members]


def play(
    act: Callable[[Story], Awaitable[None]],
    *spans: str,
    reserves: tuple[str, ...] = RESERVES,
    config: ClientOptions = PATIENT,
) -> None:
    expected()  # on a loop of its own

    async def scene() -> None:
        async with Bed(spans or FAST, reserves, cache_pages=32, drain_seconds=0.0) as bed:
            client = bed.client("client", config)
            async with RemotePasses(client.swarm) as passes:
                training = Passes(bed, client, passes)
                bed.network.on_frame = training.on_frame
                await act(Story(training))
            for member in bed.members:
                member.executor.recover()
            await asyncio.sleep(1.0)
            client.check_streams()
            await client.close()
        await bed.network.close()  # a stranger's streams

    run(scene())


def freeze(member: Member) -> None:
    """From now on it answers pings, with "working", and nothing else."""
    member.executor.thawed.clear()


def slow_down(member: Member, seconds: float) -> None:
    """From now on it takes so long for a forward pass: its executor is used once for each block, and at the end."""
    member.executor.slowness = seconds / (len(member.span) + 1) / PASS_SECONDS


@pytest.mark.parametrize("behaviour", [says_nothing, opens_nothing, computes_nothing])
@pytest.mark.parametrize("span", ["0:4", "0:2", "1:3", "2:4"])
def test_a_stranger_that_accepts_and_computes_nothing_costs_a_few_seconds_once(
    behaviour: Callable[[Stream], Awaitable[None]], span: str
):
    async def act(story: Story) -> None:
        await liar(story.bed, "liar", span, behaviour)
        assert await story.step() <= MOST_SECONDS
        assert max([await story.step() for _ in range(5)]) < 1.0

    play(act, reserves=())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_that_has_computed_passes_and_then_gives_nothing_is_overtaken(victim: int):
    async def act(story: Story) -> None:
        await story.step()
        member = story.bed.members[victim]
        freeze(member)
        assert LATE_SECONDS <= await story.step() <= MOST_SECONDS
        assert not story.is_avoided(member.name)  # once is an accident
        assert LATE_SECONDS <= await story.step() <= MOST_SECONDS
        assert story.is_avoided(member.name)
        assert await story.step() < 1.0

    play(act)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_gradient_that_a_server_has_saved_is_computed_by_another_if_it_is_late(victim: int):
    async def act(story: Story) -> None:
        plan, passes = story.passes.plan, story.passes
        outputs, pieces = await passes.forward()
        freeze(story.bed.members[victim])
        began = now()
        found = await passes.passes.backward(plan, pieces, OUTPUT_GRAD)
        assert LATE_SECONDS <= now() - began <= MOST_SECONDS
        assert equal((outputs, found), expected())

    play(act)


def test_several_servers_with_other_cuts_overtake_one():
    async def act(story: Story) -> None:
        await story.step()
        freeze(story.bed.members[0])
        assert LATE_SECONDS <= await story.step() <= MOST_SECONDS

    play(act, "0:4", reserves=("0:1", "1:3", "3:4"))


def test_two_late_servers_in_a_row_are_both_overtaken():
    async def act(story: Story) -> None:
        await story.step()
        first, *others = sorted(story.bed.members[1:], key=lambda member: -member.engine.num_passes)
        freeze(first)
        freeze(others[0])
        assert await story.step() <= LATE_SECONDS + UNPROVEN_LATE_SECONDS + 1.0
        assert others[1].engine.num_passes

    play(act, "0:2", "2:4", "2:4", "2:4", reserves=())


@pytest.mark.parametrize("span", ["0:4", "0:2"])
@pytest.mark.parametrize("behaviour", [opens_nothing, computes_nothing])
def test_many_strangers_cost_a_few_seconds_once(behaviour: Callable[[Stream], Awaitable[None]], span: str):
    async def act(story: Story) -> None:
        for index in range(40):
            await liar(story.bed, f"liar{index}", span, behaviour)
        assert await story.step() <= MOST_SECONDS
        assert max([await story.step() for _ in range(5)]) < 1.0

    play(act, reserves=())


def test_if_all_are_silent_the_client_waits_and_goes_on_when_one_of_them_does():
    async def act(story: Story) -> None:
        await story.step()
        for member in story.bed.members:
            freeze(member)
        stepping = asyncio.create_task(story.step())
        await asyncio.sleep(20.0)
        assert not stepping.done()
        for member in story.bed.members[2:]:
            member.executor.recover()
        assert await stepping <= 30.0

    play(act)


def test_the_only_server_of_its_blocks_is_waited_for():
    async def act(story: Story) -> None:
        await story.step()
        before = story.num_asked()
        for member in story.bed.members:
            slow_down(member, 8.0)
        assert await story.step() > 4 * 8.0
        assert story.num_asked() == [2 * number for number in before]

    play(act, reserves=())


def test_a_server_that_is_merely_slow_answers_first_and_stays_and_has_more_time_after_that():
    async def act(story: Story) -> None:
        await story.step()
        slow, _, reserve, _ = story.bed.members
        slow_down(reserve, 60.0)
        slow_down(slow, LATE_SECONDS + 1.0)
        was_asked = []
        for _ in range(4):
            began, before = now(), story.num_asked()[2]
            await story.passes.forward()
            assert now() - began == pytest.approx(LATE_SECONDS + 1.0, abs=0.2)
            was_asked.append(story.num_asked()[2] > before)
        assert was_asked == [True, True, False, False]
        assert not story.is_avoided(slow.name)

    play(act)


def test_honest_servers_that_have_many_passes_of_a_client_in_front_are_not_late():
    async def act(story: Story) -> None:
        await story.step()
        for member in story.bed.members:
            slow_down(member, 1.5)
        began = now()
        await story.passes.passes.forward(story.passes.plan, oracle().embed(prompt(16, 300)), None, None)
        assert now() - began >= 8 * 1.5  # the last of eight microbatches has waited for all others
        assert story.num_asked()[2:] == [0, 0]

    play(act)


def test_of_many_passes_on_their_way_to_a_slow_server_one_at_a_time_is_computed_twice():
    async def act(story: Story) -> None:
        await story.step()
        slow, _, reserve, _ = story.bed.members
        slow_down(slow, LATE_SECONDS + 1.0)
        slow_down(reserve, 1.0)
        asked_at: list[float] = []

        def note(frame: Frame) -> Frame:
            if frame.receiver == reserve.name and b'"forward"' in frame.header and frame.payload:
                asked_at.append(now())
            return frame

        story.passes.change = note
        await story.passes.passes.forward(story.passes.plan, oracle().embed(prompt(16, 300)), None, None)
        first = [at for before, at in pairwise([0.0, *asked_at]) if at > before + 0.5]  # else its adapters were missing
        assert 0 < len(first) < 8
        assert all(at >= before + LATE_SECONDS for before, at in pairwise(first))
        assert not story.is_avoided(slow.name)

    play(act)


@pytest.mark.parametrize("behaviour", [opens_nothing, computes_nothing])
def test_norms_of_weights_are_asked_of_another_server_too(behaviour: Callable[[Stream], Awaitable[None]]):
    async def act(story: Story) -> None:
        await liar(story.bed, "liar", "0:4", behaviour)
        began = now()
        found = await story.passes.passes.norms(1, ["mlp.down_proj"], 32)
        assert now() - began <= LATE_FACTOR * NORMS_SECONDS + 1.0
        weights = oracle().body(Span(0, 4)).block(1).get_submodule("mlp.down_proj").weight
        assert_equal(found, weights.norm(dim=1))

    play(act, reserves=())


def test_all_passes_on_their_way_to_a_server_that_gives_nothing_are_moved_at_once():
    async def act(story: Story) -> None:
        await story.step()
        freeze(story.bed.members[0])
        began = now()
        await story.passes.passes.forward(story.passes.plan, oracle().embed(prompt(8, 300)), None, None)
        assert now() - began <= MOST_SECONDS
        assert not story.is_avoided("s0")  # that was one accident

    play(act)


def test_a_second_server_is_audited_like_any_other(tmp_path: Path):
    async def act(story: Story) -> None:
        await story.step()
        freeze(story.bed.members[0])
        assert await story.step() <= MOST_SECONDS
        assert not story.passes.client.swarm.audits.liars

    play(act, config=replace(PATIENT, audits="high", evidence_folder=tmp_path))
