"""Into which pieces a long prompt is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.peers import Capacity, ServerInfo
from shoal.policy.routing.prompt_pieces import (
    FIXED_TOKENS,
    GRAIN,
    MOST_IN_FLIGHT,
    MOST_TOKENS_IN_FLIGHT,
    SHORT_TOKENS,
    USUAL_TOKENS,
    RingCost,
    StageCost,
    piece_length,
    prompt_seconds,
    ring_cost,
)
from shoal.policy.routing.route import Hop, Measured
from shoal.protocol import MAX_STEP_TOKENS
from shoal.spans import Span

from ..server_infos import info

SECONDS = st.floats(0, 0.1)
RINGS = st.builds(
    lambda stages, trips: RingCost(tuple(stages), trips),
    st.lists(st.builds(StageCost, SECONDS, st.floats(1e-6, 0.01), st.floats(0, 0.01)), min_size=2, max_size=10),
    st.floats(0, 2),
)

MACHINES = {"a processor": 1.0, "ten times as fast": 0.1, "a hundred times as fast": 0.01}
"""How long they take, of two cores that compute 403 tokens of a prompt a second, and 14 tokens one by one."""
TRIPS = (0.0005, 0.002, 0.05)
LINKS = {"no limit": 0.0, "1 Gbit/s": 4096 * 8 / 1e9, "100 Mbit/s": 4096 * 8 / 1e8}
"""Seconds of a token on a link."""


def best_seconds(ring: RingCost, num_tokens: int) -> float:
    """When the best equal pieces are back, of any parts of tokens, all of them under way at once."""
    numbers = range(1, num_tokens + 1)
    lengths = ((number, num_tokens / number) for number in numbers)
    return min(ring.first_seconds(length) + (number - 1) * ring.busy_seconds(length) for number, length in lengths)


def real_ring(num_servers: int, times: float, trip: float, link: float) -> RingCost:
    each = times / 403 / num_servers
    fixed = 0.002 + times / 14 / num_servers - each
    return RingCost((StageCost(fixed, each, link),) * num_servers, (num_servers + 1) * trip)


@given(RINGS, st.integers(1, 20_000), st.integers(1, 1024))
def test_pieces_are_whole_pages_and_fit_into_a_message(ring: RingCost, num_tokens: int, rows: int):
    length = piece_length(ring, num_tokens, rows=rows)
    assert 1 <= length * rows <= MAX_STEP_TOKENS
    assert length % GRAIN == 0 or length == MAX_STEP_TOKENS // rows < USUAL_TOKENS


@given(RINGS, st.integers(1, 20_000), st.integers(1, 64))
def test_no_prompt_takes_longer_than_in_pieces_of_the_usual_length(ring: RingCost, num_tokens: int, rows: int):
    length, usual = piece_length(ring, num_tokens, rows=rows), min(USUAL_TOKENS, MAX_STEP_TOKENS // rows)
    if num_tokens > SHORT_TOKENS:
        usual -= usual % GRAIN
        assert prompt_seconds(ring, num_tokens, length, rows=rows) <= prompt_seconds(ring, num_tokens, usual, rows=rows)


@given(RINGS, st.integers(1, SHORT_TOKENS))
def test_a_short_prompt_and_the_guesses_of_a_step_go_in_one_piece(ring: RingCost, num_tokens: int):
    assert piece_length(ring, num_tokens) >= num_tokens


@pytest.mark.parametrize("num_servers", [2, 4, 8])
def test_a_long_prompt_comes_close_to_the_best_that_any_pieces_allow(num_servers: int):
    for times, trip, link in product(MACHINES.values(), TRIPS, LINKS.values()):
        ring = real_ring(num_servers, times, trip, link)
        seconds = prompt_seconds(ring, 1024, piece_length(ring, 1024))
        assert seconds <= 1.15 * best_seconds(ring, 1024), (times, trip, link)


@pytest.mark.parametrize("length", [16, 64, 256, 1024])
@pytest.mark.parametrize("ring", [real_ring(8, 1.0, 0.05, LINKS["100 Mbit/s"]), real_ring(4, 0.1, 0.002, 0.0)])
def test_the_seconds_are_those_of_each_piece_on_each_server_in_turn(ring: RingCost, length: int):
    """The pieces that are under way are limited, and a link that two copies wait for is busy in between."""
    num_tokens, window = 1024, min(MOST_IN_FLIGHT, MOST_TOKENS_IN_FLIGHT // length)
    free, back = [0.0] * len(ring.stages), list[float]()
    sent_free = [0.0] * len(ring.stages)
    for number in range(num_tokens // length):
        at = back[number - window] if number >= window else 0.0
        at += ring.stages[0].each_sent * length
        for index, stage in enumerate(ring.stages):
            free[index] = at = max(at, free[index]) + stage.fixed + stage.each * length
            begins = max(at, sent_free[index])
            at = begins + stage.each_sent * length
            sent_free[index] = begins + stage.each_sent * length * (1 if index == len(ring.stages) - 1 else 2)
        back.append(at + ring.trips)
    assert prompt_seconds(ring, num_tokens, length) == pytest.approx(back[-1], rel=0.1)


def test_more_servers_get_shorter_pieces():
    lengths = [piece_length(real_ring(number, 1.0, 0.002, LINKS["1 Gbit/s"]), 1024) for number in (2, 4, 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def hop(server: ServerInfo) -> Hop:
    return Hop(server, server.span)


def test_what_servers_announce_is_what_pieces_cost():
    capacity = Capacity(4, ((4, 100.0),), 2000.0, 1.0, 1.0)
    one = replace(info("one", 0, 4, capacity=capacity), decode_speed=10.0, prefill_speed=100.0)
    other = replace(info("other", 4, 8), decode_speed=20.0, prefill_speed=200.0)
    known = Measured(round_trips={"one": 0.02, "other": 0.04}, slowness={"other": 2.0})
    ring = ring_cost([hop(one), Hop(other, Span(4, 6))], known)
    first, second = ring.stages
    assert (first.fixed, first.each, first.each_sent) == pytest.approx((0.002 + 0.09, 0.01, 1 / 2000))
    assert (second.fixed, second.each, second.each_sent) == pytest.approx((0.002 + 0.045, 0.005, 0.0))
    assert ring.trips == pytest.approx(0.01 + 0.03 + 0.02)


def test_without_announced_speeds_only_the_number_of_servers_counts():
    servers = [replace(info(f"s{index}", index, index + 1), decode_speed=None) for index in range(8)]
    ring = ring_cost(list(map(hop, servers)), Measured())
    assert ring == RingCost((StageCost(FIXED_TOKENS, 1.0),) * 8)
    assert [piece_length(RingCost(ring.stages[:number]), 1024) for number in (2, 4, 8)] == [256, 64, 64]
