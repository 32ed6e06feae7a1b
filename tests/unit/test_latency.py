"""What a client learns of servers by using them, and what follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.swarm.peer_timings import PeerTimings
from shoal.policy.routing.latency import HALF_LIFE, SLOWNESS, average_round_trip
from shoal.policy.routing.route import Hop
from shoal.policy.routing.switching import LOOK_TOKENS, pays_to_move, replay_seconds, tokens_to_next_look
from shoal.spans import Span

from .test_routing import server


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_round_trip_is_the_first_measurement_and_then_moves_towards_the_later_ones():
    assert average_round_trip(None, 0.1) == 0.1
    found = PeerTimings(Clock())
    assert found.measured().round_trips == {}
    found.record_round_trip("a", 0.1)
    assert found.measured().round_trips == {"a": 0.1}
    found.record_round_trip("a", 0.2)
    assert found.measured().round_trips == {"a": pytest.approx(0.12)}


def test_a_server_that_takes_longer_than_it_says_becomes_as_slow_as_it_is():
    found = PeerTimings(Clock())
    assert found.slowness("a") == 1.0
    for _ in range(40):
        found.record_step("a", 0.01, 0.05)
    assert found.slowness("a") == pytest.approx(5.0)
    assert found.measured().slowness == {"a": pytest.approx(5.0)}


def test_one_hiccup_does_not_condemn_a_server():
    found = PeerTimings(Clock())
    for _ in range(20):
        found.record_step("a", 0.01, 0.01)
    found.record_step("a", 0.01, 10.0)
    assert 1 < found.slowness("a") < 2.5


def test_slowness_decays_with_time():
    clock = Clock()
    found = PeerTimings(clock)
    found.record_step("a", 0.01, 0.16)
    clock.now = HALF_LIFE
    assert found.slowness("a") == pytest.approx(4.0)
    clock.now = 20 * HALF_LIFE
    assert found.slowness("a") == pytest.approx(1.0, abs=1e-4)


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))))
def test_slowness_stays_within_its_limits_for_all_measurements(steps: list[tuple[float, float]]):
    found = PeerTimings(Clock())
    for predicted, seen in steps:
        found.record_step("a", predicted, seen)
    low, high = SLOWNESS
    assert low - 1e-9 <= found.slowness("a") <= high + 1e-9


def test_moving_pays_when_enough_steps_are_left():
    def pays(num_steps_left: float, *, step: float = 0.2, better: float = 0.1, replay: float = 2.0) -> bool:
        return pays_to_move(
            step_seconds=step, better_step_seconds=better, replay_seconds=replay, num_steps_left=num_steps_left
        )

    assert not pays(20)
    assert pays(30)
    assert not pays(1e9, better=0.19)
    assert not pays(1e9, step=0.1, better=0.2)
    assert pays(1, replay=0.0)
    assert not pays(0, replay=0.0)


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.floats(0, 100), st.integers(0, 10_000))
def test_a_session_does_not_move_back_and_forth(step: float, better: float, replay: float, steps: int):
    there = pays_to_move(step_seconds=step, better_step_seconds=better, replay_seconds=replay, num_steps_left=steps)
    back = pays_to_move(step_seconds=better, better_step_seconds=step, replay_seconds=replay, num_steps_left=steps)
    assert not (there and back)


def test_a_replay_takes_as_long_as_its_tokens_take_in_its_blocks():
    hops = (Hop(server("a", "0:4", 100), Span(0, 2)), Hop(server("b", "2:4", 50), Span(2, 4)))
    assert replay_seconds(hops, 1000) == pytest.approx(5 + 20)
    assert replay_seconds(hops, 0) == 0


def test_a_session_wanders_less_and_less():
    """Where every other server looks better, a session of n tokens moves about log2(n / 32) times, and never stops."""
    num_tokens = num_moves = 0
    while num_tokens + tokens_to_next_look(num_moves) <= 4096:
        num_tokens += tokens_to_next_look(num_moves)
        num_moves += 1
    assert num_moves == 7
    assert tokens_to_next_look(0) == LOOK_TOKENS
    assert tokens_to_next_look(1000) == tokens_to_next_look(1001) < 4096
