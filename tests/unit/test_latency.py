"""What a client learns of servers by using them, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.swarm.measurements import Measurements
from shoal.policy.routing.latency import HALF_LIFE, HICCUP, LEAST_SLOWNESS, average_round_trip
from shoal.policy.routing.route import Hop
from shoal.policy.routing.switching import LOOK_SECONDS, LOOK_TOKENS, Looks, pays_to_move, replay_seconds
from shoal.spans import Span

from .test_routing import server


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_round_trip_is_the_first_measurement_and_then_moves_towards_the_later_ones():
    assert average_round_trip(None, 0.1) == 0.1
    found = Measurements(Clock())
    assert found.measured().round_trips == {}
    found.record_round_trip("a", 0.1)
    assert found.measured().round_trips == {"a": 0.1}
    found.record_round_trip("a", 0.2)
    assert found.measured().round_trips == {"a": pytest.approx(0.12)}


@pytest.mark.parametrize("factor", [0.5, 5.0, 1e4])
def test_a_server_that_takes_longer_than_it_says_becomes_as_slow_as_it_is(factor: float):
    found = Measurements(Clock())
    assert found.slowness("a") == 1.0
    for _ in range(60):
        found.record_step("a", 0.01, 0.01 * factor)
    assert found.slowness("a") == pytest.approx(factor, rel=1e-3)
    assert found.measured().slowness == {"a": pytest.approx(factor, rel=1e-3)}


@pytest.mark.parametrize(("seconds", "factor"), [(0.16, 0.5), (0.32, 1.0), (0.36, 1.0), (0.41, 1.0), (0.82, 2.0)])
def test_a_few_tokens_take_what_one_and_many_take_or_anything_between(seconds: float, factor: float):
    """A step of one token is announced to take 0.1 s, and each of many to take 0.01 s."""
    found, announced = Measurements(Clock()), replace(server("a", "0:4"), decode_speed=10.0, prefill_speed=100.0)
    found.record_answer(Hop(announced, Span(0, 4)), 32, seconds, waited=None)
    assert found.slowness("a") == pytest.approx(factor)


def test_the_slower_a_server_becomes_the_sooner_it_counts_as_slow():
    def slowness_after(num_steps: int, seconds: float) -> float:
        found = Measurements(Clock())
        found.record_step("a", 0.01, 0.01)
        for _ in range(num_steps):
            found.record_step("a", 0.01, seconds)
        return found.slowness("a")

    for num_steps in range(1, 30):
        found = [slowness_after(num_steps, seconds) for seconds in (0.1, 0.3, 1.0, 10.0, 100.0)]
        assert found == sorted(found)
    assert slowness_after(8, 100.0) > 64 * 5


def test_one_hiccup_does_not_condemn_a_server():
    found = Measurements(Clock())
    for _ in range(20):
        found.record_step("a", 0.01, 0.01)
    found.record_step("a", 0.01, 10.0)
    assert 1 < found.slowness("a") < 2.5


def test_slowness_decays_with_time():
    clock = Clock()
    found = Measurements(clock)
    found.record_step("a", 0.01, 0.16)
    clock.now = HALF_LIFE
    assert found.slowness("a") == pytest.approx(4.0)
    clock.now = 20 * HALF_LIFE
    assert found.slowness("a") == pytest.approx(1.0, abs=1e-4)


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))))
def test_no_step_changes_the_slowness_by_more_than_its_limits(steps: list[tuple[float, float]]):
    found = Measurements(Clock())
    for predicted, seen in steps:
        before = found.slowness("a")
        found.record_step("a", predicted, seen)
        assert LEAST_SLOWNESS - 1e-9 <= found.slowness("a") <= HICCUP * max(before, 1.0) * (1 + 1e-9)


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
    looks = Looks()
    for num_tokens in range(1, 4097):
        if looks.is_due(num_tokens, now=0.0):
            looks = looks.looked(num_tokens, now=0.0).moved()
    assert looks.num_moves == 7
    assert Looks(num_moves=1000).is_due(4096, now=0.0)


@pytest.mark.parametrize(("step_seconds", "num_tokens"), [(0.01, LOOK_TOKENS), (1.0, LOOK_SECONDS), (60.0, 1)])
def test_a_session_looks_after_some_tokens_or_some_time(step_seconds: float, num_tokens: int):
    looks = Looks(num_tokens=100, at=1000.0)
    due = [looks.is_due(100 + step, now=1000.0 + step * step_seconds) for step in range(40)]
    assert due.index(True) == num_tokens
    assert not looks.is_due(100, now=1e9)  # it is idle


def test_a_session_that_forgets_tokens_looks_again_after_new_ones():
    looks = Looks(num_tokens=100).cropped(10)
    assert not looks.is_due(10 + LOOK_TOKENS - 1, now=0.0)
    assert looks.is_due(10 + LOOK_TOKENS, now=0.0)
    assert looks.cropped(50) == looks


def test_each_look_is_for_the_stage_that_has_become_slowest_and_for_one_in_turn():
    looks, looked_at = Looks(), []
    for _ in range(4):
        looked_at.append(looks.stages([0.0, -1.0, 5.0, 0.1]))
        looks = looks.looked(0, now=0.0)
    assert looked_at == [(2, 0), (2, 1), (2,), (2, 3)]
