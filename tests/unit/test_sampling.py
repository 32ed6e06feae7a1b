"""Which servers a client keeps of those that it has read about."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import ServerInfo, ServerState, short
from shoal.policy.census.sampling import FEWEST_HOLDERS, estimated_round_trips, keep

from .test_routing import server

NUM_BLOCKS = 16


def swarm(number: int, rng: random.Random) -> list[ServerInfo]:
    found = []
    for index in range(number):
        start = rng.randrange(NUM_BLOCKS)
        found.append(server(f"s{index}", f"{start}:{rng.randint(start + 1, NUM_BLOCKS)}"))
    return found


def kept_of(servers: list[ServerInfo], measured: dict[str, float], most: int, seed: int = 0) -> list[ServerInfo]:
    return keep(servers, measured, num_blocks=NUM_BLOCKS, rng=random.Random(seed), most=most)


@given(st.integers(0, 300), st.integers(0, 1000))
def test_a_swarm_that_is_small_enough_is_kept_whole_and_in_order(number: int, seed: int):
    servers = swarm(number, random.Random(seed))
    assert kept_of(servers, {}, 300) == servers


@given(st.integers(1, 400), st.integers(100, 250), st.integers(0, 1000))
def test_of_a_large_swarm_no_more_are_kept_and_every_block_keeps_holders(number: int, most: int, seed: int):
    rng = random.Random(seed)
    servers = swarm(number, rng)
    measured = {each.peer: rng.random() for each in servers if rng.random() < 0.3}
    kept = kept_of(servers, measured, most, seed)
    assert len({each.peer for each in kept}) == len(kept) <= max(most, FEWEST_HOLDERS * NUM_BLOCKS)
    assert len(kept) == min(number, most) or len(kept) > most
    for block in range(NUM_BLOCKS):
        held = sum(block in each.span for each in servers)
        assert sum(block in each.span for each in kept) >= min(held, FEWEST_HOLDERS)


def test_the_only_holder_of_a_block_is_kept():
    crowd = [server(f"s{index}", "0:8") for index in range(5000)]
    kept = kept_of([*crowd, server("alone", "8:16")], {}, 100)
    assert "alone" in {each.peer for each in kept}
    assert len(kept) == 100


def test_half_are_the_nearest_and_half_are_random():
    servers = [server(f"s{index}", "0:16") for index in range(2000)]
    measured = {each.peer: index / 1000 for index, each in enumerate(servers)}
    kept = [int(each.peer[1:]) for each in kept_of(servers, measured, 200)]
    nearest = sum(index < 100 for index in kept)
    assert 95 <= nearest <= 110
    assert sum(index >= 1000 for index in kept) >= 30


def test_servers_that_leave_do_not_count_as_holders():
    leaving = [replace(server(f"s{index}", "0:16"), state=ServerState.LEAVING) for index in range(500)]
    kept = kept_of([*leaving, *(server(f"t{index}", "0:16") for index in range(20))], {}, 50)
    assert sum(each.state is ServerState.ONLINE for each in kept) >= FEWEST_HOLDERS


def test_a_server_is_as_far_as_the_way_over_one_that_was_measured():
    near, far = "12D3KooWnear-one", "12D3KooWfar-away"
    servers = [
        server(near, "0:8"),
        server("there", "8:16", to={short(near): 0.01, short(far): 0.5}),
        server("unknown", "8:16", to={"somebody": 0.01}),
    ]
    found = estimated_round_trips(servers, {near: 0.02, far: 0.3})
    assert found == {near: 0.02, "there": 0.03}


def test_a_server_is_as_far_as_others_of_its_zone():
    servers = [replace(server(f"s{index}", "0:8"), zone="eu" if index < 4 else "us") for index in range(6)]
    found = estimated_round_trips(servers, {"s0": 0.01, "s1": 0.02, "s2": 0.9})
    assert found["s3"] == 0.02
    assert "s5" not in found
