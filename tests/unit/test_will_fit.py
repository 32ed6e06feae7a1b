"""The reckoning of `shoal plan`: what it says fits adds up, and what it says is missing is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo, ServerState
from shoal.policy.machines.max_blocks import CACHE_SHARE, cache_tokens
from shoal.policy.machines.speed_profile import BlockTime, SpeedProfile
from shoal.policy.routing.costs import HOP_OVERHEAD
from shoal.policy.will_fit import DESKTOP, PROMPT_TOKENS, Hardware, Kind, Load, make_plan
from shoal.spans import Span

LOAD = Load((1000,) * 10, cache_bytes=10, output_bytes=5, read_bytes=1e6, head_bytes=5e6, used_weights=5e5)
ROUND_TRIP = 0.02


def load_of(sizes: list[int]) -> Load:
    return replace(LOAD, block_bytes=tuple(sizes))


def room_for(num_blocks: int) -> int:
    """The memory of a machine that holds so many blocks of 1000 bytes, and no more."""
    return int(1000 * (num_blocks + 0.5) / (1 - CACHE_SHARE))


def server(span: Span, *, most: int | None = None, peer: str = "12D3KooWalice", **changes: object) -> ServerInfo:
    """A server that could hold `most` blocks anywhere; `None` for one that stays where it is."""
    capacity = None if most is None else Capacity(most, ((most, 100.0),), None, 1.0, 1.0)
    info = ServerInfo(
        peer=peer,
        span=span,
        state=ServerState.ONLINE,
        fingerprint="f" * 32,
        decode_speed=100.0,
        prefill_speed=1000.0,
        cache_tokens_left=4096,
        dtype="bfloat16",
        quantization="none",
        version="0.1.0",
        capacity=capacity,
        pinned=most is None,
    )
    return replace(info, **changes)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[Load, list[Kind], list[ServerInfo]]:
    num_blocks = draw(st.integers(1, 24))
    load = load_of(draw(st.lists(st.integers(1, 5000), min_size=num_blocks, max_size=num_blocks)))
    memories = draw(st.lists(st.integers(1, 40_000), max_size=4, unique=True))
    kinds = [Kind(f"kind {index}", size, draw(st.integers(1, 4))) for index, size in enumerate(memories)]
    servers = []
    for index in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, num_blocks - 1))
        span = Span(start, draw(st.integers(start + 1, num_blocks)))
        most = draw(st.none() | st.integers(len(span), 30))
        state = draw(st.sampled_from(ServerState))
        servers.append(server(span, most=most, peer=f"12D3KooWserver{index:04d}", state=state))
    return load, kinds, servers


def stays(info: ServerInfo) -> bool:
    """Whether a server never moves, or not now."""
    return info.pinned or info.state is ServerState.JOINING


@given(swarms())
def test_what_fits_adds_up(swarm):
    load, kinds, servers = swarm
    plan = make_plan(load, kinds, servers, round_trip=ROUND_TRIP)
    there = [each for each in servers if each.state.counts]
    moved = {part.server.peer for part in plan.parts} & {each.peer for each in there}
    held = {block for part in plan.parts for block in part.span}
    held |= {block for each in there if not plan.moves or stays(each) for block in each.span}
    assert set(plan.missing) == set(range(load.num_blocks)) - held
    assert plan.fits == (plan.token_seconds is not None)
    assert not moved or plan.moves

    used = Counter(part.machine for part in plan.parts if part.server.peer not in moved)
    for kind, holds in zip(kinds, plan.holds, strict=True):
        assert used[kind.name] <= kind.count
        assert sum(sorted(load.block_bytes)[-holds:] if holds else []) <= (1 - CACHE_SHARE) * kind.free_bytes
    of_kind = dict(zip((kind.name for kind in kinds), plan.holds, strict=True))
    most = {each.peer: each.capacity.max_blocks for each in there if each.capacity is not None}
    for part in plan.parts:
        assert len(part.span) <= (most[part.server.peer] if part.server.peer in moved else of_kind[part.machine])


@given(swarms())
def test_without_servers_it_fits_if_the_machines_hold_as_many_blocks_as_there_are(swarm):
    load, kinds, _ = swarm
    plan = make_plan(load, kinds, round_trip=ROUND_TRIP)
    total = sum(kind.count * holds for kind, holds in zip(kinds, plan.holds, strict=True))
    assert plan.fits == (total >= load.num_blocks)
    assert plan.copies == total / load.num_blocks


@given(swarms())
def test_so_many_more_machines_are_enough_and_one_less_is_not(swarm):
    load, kinds, _ = swarm
    plan = make_plan(load, kinds, round_trip=ROUND_TRIP)
    for index, (kind, more) in enumerate(zip(kinds, plan.more, strict=True)):
        if more is None:
            assert plan.holds[index] == 0
            continue
        for number, fits in ((more, True), (more - 1, False)):
            if number >= 0:
                others = [*kinds[:index], replace(kind, count=kind.count + number), *kinds[index + 1 :]]
                assert make_plan(load, others, round_trip=ROUND_TRIP).fits == fits


@given(swarms(), st.floats(0, 1), st.floats(0, 1))
def test_a_slower_network_is_never_faster(swarm, one, other):
    load, kinds, servers = swarm
    plans = [make_plan(load, kinds, servers, round_trip=each) for each in sorted((one, other))]
    if plans[0].fits:
        assert plans[0].token_seconds <= plans[1].token_seconds + 1e-9


def test_machines_join_where_the_servers_have_a_hole():
    servers = [server(Span(0, 3)), server(Span(6, 10), peer="12D3KooWbert0")]
    plan = make_plan(LOAD, [Kind("small", room_for(3)), Kind("large", room_for(8))], servers, round_trip=ROUND_TRIP)
    assert [(part.machine, part.span) for part in plan.parts] == [("small", Span(3, 6))]
    assert (plan.fits, plan.moves, plan.num_hops) == (True, False, 3)
    assert plan.copies == (3 + 4 + 3 + 8) / 10


def test_servers_move_only_if_the_model_does_not_fit_otherwise():
    two = [server(Span(0, 5), most=5), server(Span(0, 5), most=5, peer="12D3KooWbert0")]
    plan = make_plan(LOAD, [], two, round_trip=ROUND_TRIP)
    assert (plan.fits, plan.moves) == (True, True)
    assert sorted(part.span for part in plan.parts) == [Span(0, 5), Span(5, 10)]
    assert not make_plan(LOAD, [Kind("one", room_for(5))], two, round_trip=ROUND_TRIP).moves
    stays = [replace(each, pinned=True) for each in two]
    assert make_plan(LOAD, [], stays, round_trip=ROUND_TRIP).missing == (5, 6, 7, 8, 9)


@pytest.mark.parametrize("state", [ServerState.LEAVING, ServerState.UNREACHABLE])
def test_a_server_that_leaves_or_cannot_be_reached_does_not_count(state: ServerState):
    plan = make_plan(LOAD, [], [server(Span(0, 10), most=10, state=state)], round_trip=ROUND_TRIP)
    assert (len(plan.missing), plan.copies) == (10, 0.0)


def test_several_holes_need_a_machine_each():
    servers = [server(Span(2, 5)), server(Span(6, 8), peer="12D3KooWbert0")]
    plan = make_plan(LOAD, [Kind("none yet", room_for(2), 0)], servers, round_trip=ROUND_TRIP)
    assert plan.missing == (0, 1, 5, 8, 9)
    assert plan.more == (3,)


def test_a_token_takes_what_its_network_and_its_memory_take():
    plan = make_plan(LOAD, [Kind("half", room_for(5), 2)], round_trip=ROUND_TRIP)
    head = LOAD.head_bytes / DESKTOP.bandwidth
    network = 3 * ROUND_TRIP / 2 + 2 * HOP_OVERHEAD  # a ring over two machines is three trips
    assert plan.token_seconds == pytest.approx(network + 10 * LOAD.read_bytes / DESKTOP.bandwidth + head)
    prompt = PROMPT_TOKENS * 2 * 10 * LOAD.used_weights / DESKTOP.flops
    assert plan.first_seconds == pytest.approx(network + prompt + head)


def test_a_measured_speed_takes_the_place_of_the_assumed_one():
    profile = SpeedProfile(5, BlockTime(0.0, 0.1), BlockTime(0.0, 0.2), 128, ((1, BlockTime(0.0, 0.1)),))
    plan = make_plan(LOAD, [Kind("whole", room_for(10))], round_trip=0.0, speed=profile)
    head = LOAD.head_bytes / DESKTOP.bandwidth
    assert plan.token_seconds == pytest.approx(10 * 0.1 + HOP_OVERHEAD + head)
    assert plan.first_seconds == pytest.approx(10 * 0.2 * PROMPT_TOKENS / 128 + HOP_OVERHEAD + head)


def test_servers_count_with_the_speed_that_they_announce():
    plan = make_plan(LOAD, [], [server(Span(0, 10))], round_trip=0.0)
    assert plan.token_seconds == pytest.approx(1 / 100 + HOP_OVERHEAD + LOAD.head_bytes / DESKTOP.bandwidth)
    silent = make_plan(LOAD, [], [server(Span(0, 10), decode_speed=None, prefill_speed=None)], round_trip=0.0)
    assumed = (10 * LOAD.read_bytes + LOAD.head_bytes) / DESKTOP.bandwidth
    assert silent.token_seconds == pytest.approx(assumed + HOP_OVERHEAD)


def test_the_cache_is_that_of_the_smallest_machine():
    plan = make_plan(LOAD, [Kind("small", room_for(3)), Kind("large", room_for(8))], round_trip=ROUND_TRIP)
    rooms = [
        cache_tokens(free_before=free, free_after=free - 1000 * num_blocks, token_bytes=10 * num_blocks + 5)
        for free, num_blocks in ((room_for(3), 2), (room_for(8), 8))
    ]
    assert plan.cache_tokens == min(rooms)


def test_a_machine_is_as_fast_as_the_user_says():
    gpu = Hardware(bandwidth=1e12, flops=1e13)
    plan = make_plan(LOAD, [Kind("whole", room_for(10))], round_trip=0.0, speed=gpu)
    rest = HOP_OVERHEAD + LOAD.head_bytes / DESKTOP.bandwidth
    assert plan.token_seconds == pytest.approx(10 * LOAD.read_bytes / 1e12 + rest)
    assert plan.first_seconds == pytest.approx(PROMPT_TOKENS * 2 * 10 * LOAD.used_weights / 1e13 + rest)
