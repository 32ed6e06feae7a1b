"""How long machines are expected to stay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.machines.lifetime import AGES, BEFORE_ANY_WAS_SEEN, Lives
from shoal.policy.machines.machine import Machine
from shoal.spans import Span


def seen(lives: dict[str, list[float]]) -> Lives:
    """Machines of zones that came at 0 and left at these ages."""
    result = Lives()
    for zone, ages in lives.items():
        for index, age in enumerate(ages):
            peer = f"{zone}{index}"
            result = result.joined(peer, zone, 0.0).departed(peer, age)
    return result


def test_the_chance_to_vanish_falls_with_age_before_anything_was_seen():
    lifetimes = Lives().lifetimes(0.0)
    losses = [lifetimes.loss("", age) for age in (0, 100, 1000, 10_000, 100_000)]
    assert losses == sorted(losses, reverse=True)
    assert all(0 < loss < 1 for loss in losses)


def test_a_typical_chance_to_vanish_is_the_same_some_seconds_later():
    steps = [BEFORE_ANY_WAS_SEEN.typical_loss(age) for age in range(0, 100_000, 10)]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(AGES)


def test_where_machines_vanished_young_young_machines_are_in_danger():
    calm = seen({"": [50_000.0] * 30}).lifetimes(50_000.0)
    rough = seen({"": [30.0] * 30}).lifetimes(50_000.0)
    assert rough.loss("", 0.0) > 2 * calm.loss("", 0.0)
    assert rough.remaining("", 0.0) < calm.remaining("", 0.0)


def test_zones_are_told_apart_and_an_unseen_zone_is_like_all():
    lifetimes = seen({"calm": [50_000.0] * 30, "rough": [30.0] * 30}).lifetimes(50_000.0)
    assert lifetimes.loss("calm", 10.0) < lifetimes.loss("elsewhere", 10.0) < lifetimes.loss("rough", 10.0)


def test_machines_that_are_still_there_count_as_well():
    lives = Lives()
    for index in range(30):
        lives = lives.joined(f"s{index}", "", 0.0)
    assert lives.lifetimes(40_000.0).loss("", 30_000.0) < lives.lifetimes(10.0).loss("", 30_000.0)


def test_a_look_at_the_swarm_notices_who_came_and_who_left():
    def machines(*peers: str) -> list[Machine]:
        return [Machine(peer, Span(0, 1), 1, ((1, 1.0),), up_since=5.0) for peer in peers]

    lives = Lives().after_view(machines("a", "b"), 10.0).after_view(machines("b", "c"), 20.0)
    assert lives == Lives().joined("a", "", 5.0).joined("b", "", 5.0).departed("a", 20.0).joined("c", "", 5.0)


def test_a_machine_that_was_never_seen_does_not_depart():
    assert Lives().departed("ghost", 3.0) == Lives()


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_to_stay_for_longer_is_less_likely_and_follows_from_the_parts(age: float, first: float, second: float):
    lifetimes = seen({"": [20.0, 500.0, 7000.0]}).lifetimes(7000.0)
    whole = lifetimes.survival("", age, first + second)
    assert whole == pytest.approx(lifetimes.survival("", age, first) * lifetimes.survival("", age + first, second))
    assert 0 <= whole <= lifetimes.survival("", age, first) <= 1


def test_the_expected_stay_is_the_sum_of_all_chances_to_stay():
    lifetimes = seen({"": [20.0, 500.0, 7000.0]}).lifetimes(7000.0)
    step = 5.0
    summed = math.fsum(lifetimes.survival("", 40.0, step * (i + 0.5)) * step for i in range(400_000))
    assert lifetimes.remaining("", 40.0) == pytest.approx(summed, rel=0.01)
