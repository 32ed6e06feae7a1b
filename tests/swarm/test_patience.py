"""Clients wait for blocks that no server computes, and go on with the same tokens. In virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.client.options.client_options import ClientOptions
from shoal.client.training.remote_passes import RemotePasses
from shoal.concurrency import now
from shoal.errors import MissingBlocks, UserError
from shoal.events import Event, WaitEnded, WaitingForBlocks
from shoal.peers import ServerInfo, ServerState
from shoal.spans import Span

from .schedules.bed import Bed, Client
from .schedules.oracle import FINGERPRINT, MODEL
from .schedules.work import microbatches, prompt, reading, short, training
from .virtual_time import run

HALVES = ("0:2", "2:4")
LAST = Span(2, 4)
PATIENT = ClientOptions(patience_seconds=180.0)
RECORD_SECONDS = 60.0
"""A killed server is announced for so long after its last renewal."""


class Scene:
    """Two servers with half of the blocks each, one client, and the events of its waits."""

    def __init__(self, bed: Bed, config: ClientOptions) -> None:
        self.bed = bed
        self.seen: list[Event] = []
        self.client: Client = bed.client("client", replace(config, observers=(self.seen.append,)))

    def kill_last(self) -> None:
        self.bed.kill(self.bed.members[1])

    def later(self, seconds: float, act: Callable[..., object], *arguments: Any) -> None:
        asyncio.get_running_loop().call_later(seconds, act, *arguments)

    def announce(self, peer: str, **others: Any) -> None:
        """Announce a server that there is not."""
        info = ServerInfo(
            peer=peer,
            span=LAST,
            state=ServerState.JOINING,
            fingerprint=FINGERPRINT,
            decode_speed=None,
            prefill_speed=None,
            cache_tokens_left=0,
            dtype="float32",
            quantization="none",
            version="0",
        )
        self.bed.network.publish(peer, MODEL, replace(info, **others), now() + 1000)

    async def waits(self) -> tuple[list[WaitingForBlocks], list[WaitEnded]]:
        """What the client told of its waits. It tells nothing any more then."""
        await self.client.swarm.events.close()
        waiting = [event for event in self.seen if isinstance(event, WaitingForBlocks)]
        return waiting, [event for event in self.seen if isinstance(event, WaitEnded)]


@contextlib.asynccontextmanager
async def scene_of(config: ClientOptions, *spans: str) -> AsyncIterator[Scene]:
    async with Bed(spans or HALVES, cache_pages=160, drain_seconds=0.0) as bed:
        scene = Scene(bed, config)
        yield scene
        scene.client.check_streams()
        await scene.client.swarm.events.close()
        await scene.client.close()


def play(act: Callable[[Scene], Awaitable[None]], config: ClientOptions = PATIENT, *spans: str) -> None:
    async def scene() -> None:
        async with scene_of(config, *spans) as here:
            await act(here)

    run(scene())


@pytest.mark.parametrize("seconds", [10.0, 60.0, 150.0])
def test_a_generation_whose_only_holder_dies_goes_on_with_the_same_tokens_when_another_appears(seconds: float):
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.say(await text.read(prompt(1, 5)), 3)  # each is compared with the model in one piece
            scene.kill_last()
            scene.later(seconds, scene.bed.start, LAST)
            began = now()
            await text.say(token, 4)
            assert seconds <= now() - began <= seconds + 5
        waiting, ended = await scene.waits()
        assert waiting[0].blocks == (2, 3)
        assert waiting[0].patience_seconds == 180.0
        assert [each.goes_on for each in ended] == [True]
        assert ended[0].blocks == (2, 3)
        assert seconds - 2 <= ended[0].waited_seconds <= seconds + 5

    play(act)


def test_the_line_says_what_is_missing_and_is_told_now_and_then():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            scene.later(100.0, scene.bed.start, LAST)
            await text.say(token, 2)
        waiting, _ = await scene.waits()
        assert "no server for blocks 2:4 answers: s1" in waiting[0].line
        last = waiting[-1].line
        assert "no server holds blocks 2:4 of tiny; the swarm is asked again every 3 s" in last
        assert last.startswith("waiting for 9")
        assert last.endswith("(for 180 s at most)")
        assert 6 <= len(waiting) <= 9

    play(act)


@pytest.mark.parametrize(("patience", "what"), [(20.0, "no server for blocks 2:4 answers: s1"), (100.0, "2:4 of tiny")])
def test_when_patience_ends_the_error_says_what_was_missing_and_how_long_the_client_waited(patience: float, what: str):
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            began = now()
            with pytest.raises(MissingBlocks, match=f"{what}.*the client waited {patience:.0f} s") as error:
                await text.say(token, 2)
            assert patience <= now() - began <= patience + 3
            assert error.value.blocks == (2, 3)
            scene.bed.start(LAST)
            text.crop(5)
            await text.say(token, 2)  # the session is as it was before the step

    play(act, replace(PATIENT, patience_seconds=patience))


def test_without_patience_a_lost_block_is_an_error_at_once():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            began = now()
            with pytest.raises(MissingBlocks, match="no server for blocks 2:4 answers: s1") as error:
                await text.read(token)
            assert "waited" not in str(error.value)
            assert now() - began < 2
        assert await scene.waits() == ([], [])

    play(act, replace(PATIENT, patience_seconds=0.0))


def test_a_session_can_be_interrupted_while_it_waits_and_goes_on_later():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            interrupted = asyncio.create_task(text.read(token))
            await asyncio.sleep(30.0)
            interrupted.cancel()
            began = now()
            with pytest.raises(asyncio.CancelledError):
                await interrupted
            assert now() - began < 0.1
            text.crop(5)
            scene.bed.start(LAST)
            await text.say(token, 3)
        _, ended = await scene.waits()
        assert ended[0].goes_on is False

    play(act)


def test_a_step_after_a_pause_waits_no_longer_than_the_client_is_patient():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            await asyncio.sleep(31.0)  # the session tries to repair itself meanwhile
            began = now()
            with pytest.raises(MissingBlocks, match="the client waited 40 s"):
                await text.read(token)
            assert 40 <= now() - began <= 46
        waiting, ended = await scene.waits()
        assert waiting[0].waited_seconds < 1  # a repair that no caller waits for is not told
        assert len(ended) == 1

    play(act, replace(PATIENT, patience_seconds=40.0))


def test_an_idle_session_is_repaired_soon_after_a_server_appears():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            await asyncio.sleep(50.0)
            scene.bed.start(LAST)
            await asyncio.sleep(16.0)
            began = now()
            await text.read(token)
            assert now() - began < 0.2  # nothing is left to repair

    play(act)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_training_pass_waits_too_and_its_gradients_are_the_same(when: str):
    async def act(scene: Scene) -> None:
        def on_phase(phase: str) -> None:
            if phase == when and scene.bed.members[1].alive:
                scene.kill_last()
                scene.later(60.0, scene.bed.start, LAST)

        scene.bed.on_phase = on_phase
        began = now()
        await training(scene.client)  # compares with the model in one piece
        assert 60 <= now() - began <= 70
        _, ended = await scene.waits()
        assert [each.goes_on for each in ended] == [True]

    play(act)


def test_microbatches_that_lack_the_same_blocks_are_one_wait():
    async def act(scene: Scene) -> None:
        def on_phase(phase: str) -> None:
            if phase == "backward" and scene.bed.members[1].alive:
                scene.kill_last()
                scene.later(10.0, scene.bed.start, LAST)

        scene.bed.on_phase = on_phase
        await microbatches(scene.client)
        waiting, ended = await scene.waits()
        assert [each.waited_seconds < 1 for each in waiting].count(True) == 1
        assert len(ended) == 1

    play(act)


def test_norms_wait_too():
    async def act(scene: Scene) -> None:
        async with RemotePasses(scene.client.swarm) as passes:
            paths, rows = ["self_attn.q_proj"], 32
            before = await passes.norms(3, paths, rows)
            scene.kill_last()
            scene.later(30.0, scene.bed.start, LAST)
            began = now()
            assert torch.equal(await passes.norms(3, paths, rows), before)
            assert 30 <= now() - began <= 35

    play(act)


def test_a_first_call_waits_for_servers_that_are_loading_and_says_when_they_expect_to_be_ready():
    async def act(scene: Scene) -> None:
        scene.announce("newcomer", name="lily", ready_at=now() + 40)
        scene.later(40.0, scene.bed.start, LAST, "newcomer")
        began = now()
        await short(scene.client)
        assert 40 <= now() - began <= 42
        waiting, ended = await scene.waits()
        assert waiting[0].expected_seconds == pytest.approx(40, abs=0.1)
        assert "lily loads 2:4 and expects to be ready in 40 s" in waiting[0].line
        assert [each.goes_on for each in ended] == [True]

    play(act, PATIENT, "0:2")


def test_a_server_that_loads_the_missing_blocks_is_news():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.bed.dismiss(scene.bed.members[1])
            await asyncio.sleep(1.0)
            scene.later(20.0, lambda: scene.announce("newcomer", ready_at=now() + 30))
            scene.later(50.0, scene.bed.start, LAST, "newcomer")
            await text.say(token, 2)
        waiting, _ = await scene.waits()
        assert waiting[0].expected_seconds is None
        news = next(each for each in waiting if each.expected_seconds is not None)
        assert 19 <= news.waited_seconds <= 24
        assert news.expected_seconds == pytest.approx(28, abs=4)

    play(act)


def test_a_server_that_loads_for_ever_is_not_waited_for_longer_than_the_patience():
    async def act(scene: Scene) -> None:
        scene.announce("liar", ready_at=now() + 10)
        began = now()
        with pytest.raises(MissingBlocks, match=r"liar loads 2:4 and should have been ready 50 s ago.*waited 60 s"):
            await short(scene.client)
        assert 60 <= now() - began <= 61

    play(act, replace(PATIENT, patience_seconds=60.0), "0:2")


def test_the_same_server_that_comes_back_after_a_minute_is_used_at_once():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.kill_last()
            scene.later(60.0, lambda: scene.announce("s1", ready_at=now() + 20))
            scene.later(80.0, scene.bed.start, LAST, "s1")
            began = now()
            await text.say(token, 2)
            assert 80 <= now() - began <= 82

    play(act)


def test_the_only_server_that_was_cut_off_for_two_minutes_is_used_again_soon_after():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.bed.network.cut("s1", "client")
            scene.later(120.0, scene.bed.network.heal)
            began = now()
            await text.say(token, 2)
            assert 120 <= now() - began <= 130

    play(act)


def test_blocks_that_the_swarm_never_had_are_an_error_at_once():
    async def act(scene: Scene) -> None:
        with pytest.raises(MissingBlocks, match=r"no server holds blocks 2:4 of tiny$"):
            await short(scene.client)
        assert now() < 1

    play(act, PATIENT, "0:2")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"allowed_servers": frozenset({"s0"})}, "blocks 2:4 are served only by servers that you do not allow"),
        ({"blocked_servers": frozenset({"s1"})}, "blocks 2:4 are served only by servers that you do not allow"),
        ({"pinned": ((Span(3, 4), "s0"),)}, "blocks 3:4 are pinned to s0, which holds 0:2"),
    ],
    ids=["allowed", "blocked", "pinned"],
)
def test_blocks_that_the_users_own_choice_excludes_are_an_error_at_once(options: dict[str, Any], what: str):
    async def act(scene: Scene) -> None:
        with pytest.raises(MissingBlocks, match=what):
            await short(scene.client)
        assert now() < 1

    play(act, replace(PATIENT, **options))


def test_a_choice_of_servers_that_changes_counts_at_once():
    async def act(scene: Scene) -> None:
        await short(scene.client)
        scene.client.swarm.permit(frozenset({"s0"}), frozenset())
        began = now()
        with pytest.raises(MissingBlocks, match="that you do not allow"):
            await short(scene.client)
        assert now() - began < 1

    play(act)


def test_blocks_with_other_weights_are_an_error_at_once_unless_the_swarm_had_those_of_the_client():
    async def act(scene: Scene) -> None:
        scene.announce("stranger", state=ServerState.ONLINE, fingerprint="e" * 64)
        with pytest.raises(MissingBlocks, match="served only with other weights"):
            await short(scene.client)
        assert now() < 1
        right = scene.bed.start(LAST)
        await asyncio.sleep(0.1)
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.bed.kill(right)
            scene.later(70.0, scene.bed.start, LAST)
            await text.say(token, 2)

    play(act, PATIENT, "0:2")


def test_a_client_waits_for_a_directory_that_does_not_answer():
    async def act(scene: Scene) -> None:
        async with reading(scene.client) as text:
            token = await text.read(prompt(1, 5))
            scene.bed.network.directory_answers = False
            scene.kill_last()
            scene.later(40.0, setattr, scene.bed.network, "directory_answers", True)
            scene.later(40.5, scene.bed.start, LAST)
            began = now()
            await text.say(token, 2)
            assert 40 <= now() - began <= 50

    play(act)


@pytest.mark.parametrize("patience", [-1.0, float("nan"), float("inf")])
def test_patience_is_a_number_of_seconds(patience: float):
    with pytest.raises(UserError, match="it is a number of seconds"):
        ClientOptions.from_keywords(patience=patience)
