"""Servers choose their blocks together, and go to others when the swarm needs that. Clients go on meanwhile."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from shoal.events import ServerLost, StageReplaced, WaitingForBlocks
from shoal.peers import ServerInfo, ServerState
from shoal.policy.census.levels import level_for
from shoal.policy.machines.machine import Machine
from shoal.policy.placement.mover import Mover
from shoal.policy.placement.plan import Move
from shoal.server.placing import span_keeper
from shoal.server.placing.loaded_span import LoadedSpan
from shoal.server.placing.span_state import AVOIDED_SECONDS
from shoal.spans import Span

from .moving import DRAIN_SECONDS, LOAD_SECONDS, Stage, Town, make_checkpoint, make_virtual, together
from .schedules.oracle import NUM_BLOCKS
from .schedules.work import prompt, reading, training

FIRST, LAST = Span(0, 2), Span(2, 4)
LOAD = 2 * LOAD_SECONDS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    make_virtual(monkeypatch)
    return Stage(checkpoint)


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with random numbers for all blocks."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    state = random.getstate()
    random.seed(0)
    yield
    random.setstate(state)


def now() -> float:
    return asyncio.get_running_loop().time()


def planning(monkeypatch: pytest.MonkeyPatch, *, agreed: bool = True, fills: tuple[int, ...] = ()) -> dict[str, Span]:
    """Plans are what the test says: the spans, by peer, to which servers move. It may change while they run.

    Unless the servers have `agreed` on the plan, each believes that its move is the first.
    """
    wanted: dict[str, Span] = {}

    def plan(machines: Sequence[Machine], *_: Any) -> tuple[Move, ...]:
        held = {machine.peer: machine.span for machine in machines if machine.movable and machine.span is not None}
        moves = [(peer, held[peer], after) for peer, after in sorted(wanted.items()) if held.get(peer, after) != after]
        return tuple(
            Move(peer, before, after, 1.0, fills, rank if agreed else 0, "the test says so")
            for rank, (peer, before, after) in enumerate(moves)
        )

    monkeypatch.setattr(span_keeper, "Mover", functools.partial(Mover, planner=plan))
    monkeypatch.setattr("shoal.policy.placement.mover.PLAN_EVERY", 1.0)
    monkeypatch.setattr("shoal.policy.placement.mover.PLAN_ANYWAY", 1.0)
    return wanted


async def settle(town: Town, *movers: str, stay: int) -> list[str]:
    """Servers that may move hold the first blocks, and `stay` others the last ones for ever; returns the latter."""
    pinned = [f"z{index}" for index in range(stay)]
    await town.start(*pinned, blocks=LAST)
    await town.start(*movers)
    assert [town.members[name].span for name in movers] == [FIRST] * len(movers)
    return pinned


async def settle_one(town: Town) -> None:
    """The server "m", which may move, holds the first blocks, as the server "b" does. The server "a" holds the last."""
    await town.start("a", blocks=LAST)
    await town.start("m")
    await town.start("b", blocks=FIRST)
    assert town.members["m"].span == FIRST


# -- holes -------------------------------------------------------------------------------------------------------------


def test_the_only_holder_of_blocks_dies_another_server_takes_them_and_all_clients_go_on(stage: Stage):
    async def scene(town: Town) -> None:
        victim, other = await settle(town, "a", "b", stay=2)
        await town.leave(other)
        clients = [town.client() for _ in range(3)]

        async def strike() -> None:
            await town.until(lambda: all(client.num_tokens >= 20 for client in clients))
            killed_at = now()
            town.kill(victim)
            await town.until(lambda: town.view.missing() == [])
            assert now() - killed_at <= LOAD + 5.0
            assert town.num_moves == 1
            assert len(town.holders(LAST)) == 1

        talks = [client.talk(50, seed=seed, seconds_each=0.05) for seed, client in enumerate(clients)]
        await together(*talks, strike())
        assert all(client.num_tokens == 50 for client in clients)
        for client in clients:
            client.check_streams()

    stage.play(scene)


def test_a_hole_is_filled_by_one_server_although_several_could(stage: Stage):
    async def scene(town: Town) -> None:
        for name in await settle(town, "a", "b", "c", stay=3):
            town.kill(name)
        await town.until(lambda: town.view.missing() == [])
        await asyncio.sleep(300)
        moves = [change for member in town.members.values() for _, change in member.moves]
        assert ["had no server" in change.reason for change in moves].count(True) == 1
        assert town.view.missing() == []

    stage.play(scene)


def test_of_servers_that_claim_the_same_hole_at_the_same_moment_one_goes(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """Their plans differ, because each believes that it is the one that moves. Their claims decide."""
    wanted = planning(monkeypatch, agreed=False, fills=tuple(LAST))

    async def scene(town: Town) -> None:
        victims = await settle(town, "a", "b", "c", stay=3)
        await town.start("d", blocks=FIRST)
        for name in victims:
            town.kill(name)
        wanted.update(a=LAST, b=LAST, c=LAST)
        await town.until(lambda: town.view.missing() == [])
        await asyncio.sleep(300)
        assert town.num_moves == 1

    stage.play(scene)


def test_servers_that_are_pinned_never_move(stage: Stage):
    async def scene(town: Town) -> None:
        await town.start("a", "b", blocks=FIRST)
        await town.start("c", blocks=LAST)
        await town.start("d", move=False)
        assert all(info.pinned for info in town.infos.values())
        for name in [name for name, member in town.members.items() if member.span == LAST]:
            town.kill(name)
        await asyncio.sleep(600)
        assert town.num_moves == 0
        assert town.view.missing()

    stage.play(scene)


# -- handing over ------------------------------------------------------------------------------------------------------


def test_a_server_that_moves_hands_its_sessions_over_and_no_client_loses_a_token(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await settle(town, "m", stay=1)
        clients = [town.client() for _ in range(3)]

        async def strike() -> None:
            await town.until(lambda: all(client.num_tokens >= 10 for client in clients))
            await town.start("b", blocks=FIRST)
            wanted["m"] = LAST
            await town.until(lambda: town.members["m"].span == LAST)

        talks = [client.talk(60, seed=seed, seconds_each=0.5) for seed, client in enumerate(clients)]
        await together(*talks, strike())
        assert town.num_moves == 1
        assert town.members["m"].moves[0][1].reason == "the test says so"
        for client in clients:
            assert not [event for event in client.told if isinstance(event, ServerLost)]
            assert [event.peer for event in client.told if isinstance(event, StageReplaced)] == ["m"]

    stage.play(scene)


def test_training_goes_on_while_a_server_moves(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await settle_one(town)
        done = asyncio.Event()

        async def train() -> None:
            client = town.client()
            while not done.is_set():
                await training(client)
                await asyncio.sleep(2)

        async def strike() -> None:
            for after in (LAST, FIRST, LAST):
                wanted["m"] = after
                await town.until(lambda after=after: town.members["m"].span == after)  # type: ignore[misc]
            done.set()

        await together(train(), strike())
        assert town.num_moves == 3

    stage.play(scene)


@pytest.mark.parametrize("agreed", [True, False])
def test_no_move_opens_a_hole(stage: Stage, monkeypatch: pytest.MonkeyPatch, agreed: bool):
    """Two servers are told to leave the same blocks. Each would leave them to the other one."""
    wanted = planning(monkeypatch, agreed=agreed)

    async def scene(town: Town) -> None:
        await settle(town, "a", "b", stay=3)
        holes: list[float] = []

        async def look() -> None:
            while True:
                if town.view.missing():
                    holes.append(now())
                await asyncio.sleep(0.05)

        looking = asyncio.create_task(look())
        wanted.update(a=LAST, b=LAST)
        await asyncio.sleep(400)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        assert not holes
        assert town.holders(FIRST)

    stage.play(scene)


def test_hosted_adapters_and_the_output_head_follow_the_blocks(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, adapter: Path
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await town.start("a", blocks=LAST)
        await town.start("m", adapters=(str(adapter),), serve_head=True)
        await town.start("b", blocks=FIRST)
        member = town.members["m"]
        assert member.server is not None
        assert not town.infos["m"].head
        before = set(member.server.engine.adapters.names)
        assert before
        wanted["m"] = LAST
        await town.until(lambda: member.span == LAST)
        assert town.infos["m"].head
        after = set(member.server.engine.adapters.names)
        assert len(after) == len(before)
        assert not after & before
        assert town.infos["m"].adapters

    stage.play(scene)


# -- starting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [1, 2])
def test_four_servers_that_start_at_the_same_moment_leave_no_hole(stage: Stage, seed: int, most: int):
    async def scene(town: Town) -> None:
        chance = random.Random(seed)
        names = chance.sample([f"s{index}" for index in range(100)], 4)
        members = []
        for name in names:
            members.append(town.begin(name))
            await asyncio.sleep(chance.choice([0.0, 0.0, chance.uniform(0, 2)]))
        await town.until_online(*members)
        assert town.view.missing() == []
        assert town.num_moves == 0

    stage.play(scene, num_blocks=most)


def test_a_server_takes_at_most_the_blocks_that_it_may(stage: Stage):
    async def scene(town: Town) -> None:
        await town.start("a", num_blocks=3)
        assert len(town.members["a"].span or ()) == 3
        assert town.infos["a"].capacity is not None
        assert town.infos["a"].capacity.max_blocks == 3
        assert town.infos["a"].reason

    stage.play(scene)


@pytest.mark.parametrize("rule", ["graded", "petals"])
def test_either_rule_completes_the_swarm(stage: Stage, rule: str):
    async def scene(town: Town) -> None:
        await town.start("a", "b", "c", "d")
        assert town.view.missing() == []

    stage.play(scene, placement=rule)


# -- blocks that a server keeps ----------------------------------------------------------------------------------------


async def roomy_one(town: Town) -> list[list[int]]:
    """The server "m" has room for all blocks and is the only one with the first ones; "a" holds the last ones.

    Returns a list of what was missing at any moment, which goes on growing.
    """
    await town.start("a", blocks=LAST)
    await town.start("m", num_blocks=NUM_BLOCKS)
    assert FIRST in town.members["m"].span  # type: ignore[operator]
    seen: list[list[int]] = []

    def look(info: ServerInfo) -> ServerInfo:
        asyncio.get_running_loop().call_soon(lambda: seen.append(town.view.missing()))
        return info

    town.network.on_announce = look
    return seen


async def m_goes(town: Town, wanted: dict[str, Span], after: Span) -> None:
    """Have the server "m" plan to go there, and wait until it has."""
    wanted["m"] = after
    await town.until(lambda: town.members["m"].span == after)


def test_the_only_holder_of_blocks_serves_them_while_it_takes_others_and_gives_some_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        missing = await roomy_one(town)
        client = town.client()

        async def change() -> None:
            for after in (FIRST, Span(0, 3), Span(0, 4), Span(0, 2), Span(0, 4), FIRST):
                await m_goes(town, wanted, after)
                await asyncio.sleep(DRAIN_SECONDS)

        await together(client.talk(100, seconds_each=1.0), training(town.client()), change())
        assert missing
        assert not any(missing)
        assert not [event for event in client.told if isinstance(event, WaitingForBlocks)]
        client.check_streams()

    stage.play(scene)


def test_a_server_that_cannot_load_more_blocks_goes_on_with_those_that_it_has(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)
    tried: list[float] = []

    async def fail(*_: Any) -> LoadedSpan:
        tried.append(now())
        await asyncio.sleep(LOAD_SECONDS)
        raise MemoryError

    async def scene(town: Town) -> None:
        await roomy_one(town)
        await m_goes(town, wanted, FIRST)
        monkeypatch.setattr(span_keeper, "extend_span", fail)
        client = town.client()
        wanted["m"] = Span(0, 3)
        await together(client.talk(50, seconds_each=1.0), town.until(lambda: len(tried) == 1))
        await town.until(lambda: town.infos["m"].wants is None)
        assert (town.infos["m"].state, town.infos["m"].span) == (ServerState.ONLINE, FIRST)
        await asyncio.sleep(60)
        assert len(tried) == 1, "it does not try again soon"

    stage.play(scene)


def test_a_server_gives_no_block_up_whose_other_server_has_gone_while_it_loaded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        missing = await roomy_one(town)
        await m_goes(town, wanted, FIRST)
        await town.start("b", blocks=Span(0, 1))
        client = town.client()
        wanted["m"] = Span(1, 4)

        async def leave() -> None:
            await town.until(lambda: town.infos["m"].wants == Span(1, 4) and town.infos["m"].ready_at is not None)
            await town.leave("b")
            await town.until(lambda: town.infos["m"].wants is None)
            del wanted["m"]
            assert (town.infos["m"].state, town.infos["m"].span) == (ServerState.ONLINE, FIRST)

        await together(client.talk(60, seconds_each=0.5), leave())
        assert not any(missing)
        assert town.infos["m"].span == FIRST

    stage.play(scene)


def test_a_server_that_is_stopped_while_it_takes_more_blocks_leaves_like_any_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await roomy_one(town)
        await m_goes(town, wanted, FIRST)
        await town.start("b", blocks=FIRST)
        wanted["m"] = Span(0, 3)
        client = town.client()
        talking = client.talk(30, seconds_each=0.5)

        async def stop() -> None:
            await town.until(lambda: town.infos["m"].wants == Span(0, 3) and town.infos["m"].ready_at is not None)
            await town.leave("m")

        await together(talking, stop())
        assert town.network.num_handlers("m") == 0

    stage.play(scene)


def test_a_server_that_changes_its_blocks_while_clients_of_a_former_span_are_still_there(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)
    monkeypatch.setattr("shoal.policy.placement.mover.REST_SECONDS", 0.0)

    async def scene(town: Town) -> None:
        await roomy_one(town)
        await m_goes(town, wanted, FIRST)
        await town.start("b", blocks=FIRST)
        early, late = town.client(), town.client()
        async with reading(early, max_length=64) as first, reading(late, max_length=64) as second:
            for client, text, before, after in (
                (early, first, FIRST, Span(0, 3)),
                (late, second, Span(0, 3), Span(3, 4)),
            ):
                assert town.members["m"].span == before
                town.network.cut(client.name, "b")
                await text.read(prompt(1, 9, seed=0))
                town.network.hang(client.name)
                wanted["m"] = after
                if client is early:
                    await town.until(lambda after=after: town.members["m"].span == after)  # type: ignore[misc]
            await town.until(lambda: town.members["m"].span == Span(3, 4))
            assert town.view.missing() == []
            town.network.heal()
            await town.client().talk(10)

    stage.play(scene)


def test_a_client_whose_directory_does_not_know_yet_that_the_only_holder_has_moved_waits_until_it_does(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await roomy_one(town)
        await m_goes(town, wanted, FIRST)
        client = town.client()
        await client.talk(5)
        stale = town.infos["m"]
        town.network.on_announce = lambda info: stale if info.peer == "m" else info
        await m_goes(town, wanted, Span(0, 3))
        wanted["m"] = Span(1, 3)
        await town.start("b", blocks=Span(0, 1))
        await town.until(lambda: town.members["m"].span == Span(1, 3))
        assert town.infos["m"].span == FIRST

        async def tell() -> None:
            await town.until(lambda: any(isinstance(event, WaitingForBlocks) for event in client.told))
            town.network.on_announce = None

        await together(client.talk(20, seconds_each=0.5), tell())

    stage.play(scene)


def test_others_fill_the_hole_of_a_server_that_only_wants_those_blocks(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """A claim that is open is no promise: the server that serves nothing else comes first."""
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await settle_one(town)
        wanted["m"] = LAST
        await town.until(lambda: town.infos["m"].wants == LAST)
        assert (town.infos["m"].state, town.infos["m"].span) == (ServerState.ONLINE, FIRST)
        assert town.infos["m"].ready_at is None
        await town.until(lambda: town.members["m"].span == LAST)

    stage.play(scene)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, *, fails: Callable[[str, Span], Exception | None]) -> None:
    """Loading raises what `fails` says of a server's name and a span."""
    load_span = span_keeper.load_span

    async def load(config: Any, setup: Any, span: Span, *rest: Any) -> LoadedSpan:
        if (error := fails(config.name, span)) is not None:
            await asyncio.sleep(LOAD_SECONDS)
            raise error
        return await load_span(config, setup, span, *rest)

    monkeypatch.setattr(span_keeper, "load_span", load)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError("no space left on device"), RuntimeError("can't allocate memory")]
)
def test_a_server_that_cannot_load_its_new_blocks_goes_back_and_does_not_try_again_soon(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    wanted = planning(monkeypatch)
    tried: list[float] = []

    def fails(name: str, span: Span) -> Exception | None:
        if name != "m" or span != LAST:
            return None
        tried.append(now())
        return error

    failing(monkeypatch, fails=fails)

    async def scene(town: Town) -> None:
        await settle_one(town)
        client = town.client()
        wanted["m"] = LAST
        await together(client.talk(40, seconds_each=0.5), town.until(lambda: bool(tried)))
        await town.until(lambda: town.infos["m"].state is ServerState.ONLINE)
        assert town.infos["m"].span == FIRST
        assert town.infos["m"].reason.startswith("back from 2:4")
        assert town.infos["m"].pinned
        await asyncio.sleep(AVOIDED_SECONDS - 60)
        assert len(tried) == 1
        await asyncio.sleep(120)
        assert len(tried) == 2

    stage.play(scene)


def test_a_server_that_can_load_nothing_tries_again_later_and_says_meanwhile_that_it_has_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    wanted = planning(monkeypatch)
    broken = False

    def fails(name: str, span: Span) -> Exception | None:
        return OSError("the disk is gone") if broken and name == "m" else None

    failing(monkeypatch, fails=fails)

    async def scene(town: Town) -> None:
        nonlocal broken
        await settle_one(town)
        broken, wanted["m"] = True, LAST
        await town.until(lambda: town.infos["m"].state is ServerState.LEAVING)
        broken = False
        wanted.clear()
        await town.until(lambda: town.infos["m"].state is ServerState.ONLINE)
        await town.client().talk(10)

    stage.play(scene)


def test_a_server_whose_first_blocks_cannot_be_loaded_ends(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, fails=lambda name, span: OSError("the disk is gone"))

    async def scene(town: Town) -> None:
        await town.start("a")

    with pytest.raises(OSError, match="the disk is gone"):
        stage.play(scene)


@pytest.mark.parametrize("phase", ["claiming", "draining", "loading"])
def test_a_server_that_is_told_to_stop_while_it_moves_stops_quickly(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, phase: str
):
    wanted = planning(monkeypatch)

    async def scene(town: Town) -> None:
        await settle_one(town)
        wanted["m"] = LAST
        server = town.members["m"].server
        assert server is not None
        talking = asyncio.create_task(town.client().talk(40, seconds_each=1.0))  # sessions make draining take a while
        await town.until(lambda: server.phase == phase)
        assert await town.leave("m") <= DRAIN_SECONDS + 1
        await talking
        assert town.infos["m"].state is ServerState.LEAVING
        assert town.members["m"].changes[-1][1].now is None

    stage.play(scene)


def test_the_memory_of_the_old_blocks_is_free_before_the_new_ones_are_loaded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    wanted = planning(monkeypatch)
    left: list[list[str]] = []
    collect_memory = span_keeper.collect_memory

    async def collect(executor: Any, device: Any, remains: Callable[[], list[str]]) -> None:
        await collect_memory(executor, device, remains)
        left.append(remains())

    monkeypatch.setattr(span_keeper, "collect_memory", collect)

    async def scene(town: Town) -> None:
        await settle_one(town)
        client = town.client()
        for after in (LAST, FIRST):
            wanted["m"] = after
            talks = (client.talk(30, seconds_each=0.5), training(town.client()))
            await together(*talks, town.until(lambda after=after: town.members["m"].span == after))  # type: ignore[misc]

    with caplog.at_level(logging.WARNING):
        stage.play(scene)
    assert left == [[], []]
    assert not [record for record in caplog.records if "could not free" in record.message]


# -- crowds ------------------------------------------------------------------------------------------------------------


async def settle_in_crowd(town: Town, crowd: Mapping[Span, int]) -> None:
    """The server "m" may move and holds the first blocks, among as many others of each span: records that stay."""
    await town.start("a", blocks=LAST)
    await town.start("m")
    assert town.members["m"].span == FIRST
    level = level_for(sum(crowd.values()), None)
    for span, number in crowd.items():
        for index in range(number):
            info = replace(town.infos["a"], peer=f"{span}#{index}", name="", span=span, pinned=True)
            town.network.publish(info.peer, town.model, info, 1e6, level=level)


def test_in_a_crowd_that_is_even_a_server_stays_whatever_sample_of_it_the_server_reads(stage: Stage):
    async def scene(town: Town) -> None:
        await settle_in_crowd(town, {FIRST: 600, LAST: 600})
        await asyncio.sleep(900)
        assert town.num_moves == 0

    stage.play(scene)


def test_in_a_crowd_that_is_not_even_a_server_goes_where_there_are_few(stage: Stage):
    async def scene(town: Town) -> None:
        await settle_in_crowd(town, {FIRST: 900, LAST: 300})
        await town.until(lambda: town.num_moves == 1)
        assert town.members["m"].span in LAST
        await asyncio.sleep(600)
        assert town.num_moves == 1

    stage.play(scene)
