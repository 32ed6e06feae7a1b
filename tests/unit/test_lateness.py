"""When a step is late, how many second servers it gets, and who is blamed for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.client.decoding.outputs import NoOutputs, Outputs, beside
from shoal.client.head.logits import Logits
from shoal.client.swarm.known.peer_health import PeerHealth
from shoal.errors import ServerLate
from shoal.policy.health import DEPRIORITIZE_SECONDS
from shoal.policy.lateness import (
    LATE_FACTOR,
    LATE_SECONDS,
    OPENING_LATE_ROUND_TRIPS,
    OPENING_LATE_SECONDS,
    OVERTAKEN_SECONDS,
    PATIENT_AFTER,
    UNPROVEN_LATE_SECONDS,
    WARY_SECONDS,
    Awaited,
    LateButFirst,
    after_late_but_first,
    after_overtaken,
    late_after,
    opening_late_after,
    pass_late_at,
    result_late_at,
)
from shoal.policy.routing.latency import seen_seconds

from .test_peer_health import Clock


def test_a_fast_step_is_late_after_some_seconds_and_a_slow_one_after_a_multiple_of_its_time():
    assert late_after(0.01) == LATE_SECONDS
    assert late_after(2.0) == LATE_FACTOR * 2.0


def test_a_server_that_is_always_late_has_more_time_from_the_moment_on_at_which_it_is_left():
    found = [late_after(0.01, num_late=number) for number in range(PATIENT_AFTER + 2)]
    assert found == [LATE_SECONDS] * PATIENT_AFTER + [2 * LATE_SECONDS, 4 * LATE_SECONDS]


def test_a_server_that_has_never_computed_a_step_is_late_sooner_unless_the_step_takes_long():
    assert late_after(0.01, is_proven=False) == UNPROVEN_LATE_SECONDS < LATE_SECONDS
    assert late_after(2.0, is_proven=False) == LATE_FACTOR * 2.0


def test_what_should_be_opened_is_late_after_a_second_or_some_round_trips():
    assert opening_late_after(None) == opening_late_after(0.05) == OPENING_LATE_SECONDS
    assert opening_late_after(0.5) == OPENING_LATE_ROUND_TRIPS * 0.5


def test_a_result_of_a_server_that_has_failed_since_is_late_as_what_should_be_opened():
    assert result_late_at(7.0, None) == 7.0 + opening_late_after(None)
    assert result_late_at(7.0, 0.5) == 7.0 + opening_late_after(0.5)


def test_a_server_that_never_did_anything_is_tried_last_from_the_first_time_on_and_makes_the_client_wary():
    clock = Clock()
    health = PeerHealth(clock)
    health.record_error(ServerLate("opened no session", peer="late"), since=clock.now)
    assert health.deprioritized("late")
    assert not health.lost("late")
    assert health.is_wary
    clock.now += DEPRIORITIZE_SECONDS
    assert not health.deprioritized("late")
    health.record_overtaken("late", "gave nothing", is_proven=False)
    clock.now += 1.9 * DEPRIORITIZE_SECONDS
    assert health.deprioritized("late")
    clock.now += WARY_SECONDS
    assert not health.is_wary


def test_a_step_is_late_by_when_it_could_have_been_begun():
    awaited = Awaited((0, 5), since=100.0, usual_seconds=0.1)
    assert awaited.late_at() == 100.0 + LATE_SECONDS
    assert awaited.late_at(num_late=PATIENT_AFTER) == 100.0 + 2 * LATE_SECONDS


def pass_lateness(asked_at: float, **changes: Any) -> float:
    """For how long after it was asked a server has time for a pass."""
    usual = {"usual_seconds": 0.01, "answered_at": float("-inf"), "known": None, "is_proven": True}
    return pass_late_at(asked_at, **{**usual, **changes}) - asked_at


def test_a_pass_is_late_like_a_step():
    assert pass_lateness(100.0) == LATE_SECONDS
    assert pass_lateness(100.0, usual_seconds=2.0) == LATE_FACTOR * 2.0
    assert pass_lateness(100.0, is_proven=False) == UNPROVEN_LATE_SECONDS


def test_a_server_that_answers_one_pass_after_another_is_not_late_with_the_last_of_them():
    assert pass_lateness(100.0, answered_at=107.0) == 7.0 + LATE_SECONDS
    assert pass_lateness(100.0, answered_at=93.0) == LATE_SECONDS


def test_a_server_that_was_late_and_first_again_and_again_has_more_time_for_some_minutes():
    for number in range(1, PATIENT_AFTER + 3):
        known = LateButFirst(number, at=90.0)
        assert pass_lateness(100.0, known=known) == late_after(0.01, num_late=number)
        assert pass_lateness(91.0 + OVERTAKEN_SECONDS, known=known) == LATE_SECONDS


def test_passes_that_were_on_their_way_together_are_late_once():
    once = after_late_but_first(None, since=10.0, now=14.0)
    assert after_late_but_first(once, since=11.0, now=15.0) == once
    twice = after_late_but_first(once, since=14.5, now=18.0)
    assert twice == LateButFirst(2, 18.0)
    assert after_late_but_first(twice, since=400.0, now=404.0) == LateButFirst(1, 404.0)


def test_once_is_an_accident_twice_within_some_minutes_is_not():
    once = after_overtaken(None, now=0.0)
    assert not once.is_blamed
    assert after_overtaken(once, now=OVERTAKEN_SECONDS).is_blamed
    assert not after_overtaken(once, now=OVERTAKEN_SECONDS + 1.0).is_blamed


def test_a_server_that_is_overtaken_again_is_deprioritized_for_longer_each_time_and_not_lost():
    clock = Clock()
    health = PeerHealth(clock)
    health.record_overtaken("a", "late")
    assert not health.deprioritized("a")
    for growth in (1, 2, 4):
        health.record_overtaken("a", "late")
        clock.now += DEPRIORITIZE_SECONDS * growth - 1.0
        assert health.deprioritized("a")
        assert not health.blocked("a")
        assert not health.lost("a")
        clock.now += 1.0
        assert not health.deprioritized("a")


@pytest.mark.parametrize(
    ("said", "waited", "seen"),
    [(0.02, 0.03, 0.02), (0.02, 1.0, 0.02), (0.02, 2.9, 2.8), (1.0, 2.9, 1.0), (1.0, 6.1, 6.0)],
)
def test_a_server_is_believed_how_long_a_step_took_except_if_the_client_has_waited_much_longer(
    said: float, waited: float, seen: float
):
    assert seen_seconds(said, waited=waited, round_trip=0.1) == pytest.approx(seen)


# -- what a second server has computed ---------------------------------------------------------------------------------


def test_the_outputs_of_a_second_server_follow_those_that_are_known():
    known = Outputs(3)
    known.append(torch.zeros(1, 2, 4), 3)
    second = beside(known)
    second.append(torch.ones(1, 3, 4), 5)
    second.move_to(known)
    joined = known.joined()
    assert isinstance(joined, torch.Tensor)
    assert joined[0, :, 0].tolist() == [0, 0, 1, 1, 1]


def test_where_outputs_are_not_needed_those_of_a_second_server_are_not_either():
    assert isinstance(beside(NoOutputs()), NoOutputs)


def test_the_logits_of_a_second_server_take_the_place_of_those_that_a_late_one_has_sent():
    known = Outputs(3)
    known.logits.append(Logits(torch.zeros(1, 1, 5), None))
    second = beside(known)
    second.logits.append(Logits(torch.ones(1, 2, 5), None))
    second.move_to(known)
    joined = known.joined()
    assert isinstance(joined, Logits)
    assert joined.values.tolist() == torch.ones(1, 2, 5).tolist()


def test_a_second_server_without_a_head_gives_outputs_in_place_of_the_late_ones_logits():
    known = Outputs(3)
    known.logits.append(Logits(torch.zeros(1, 1, 5), None))
    second = beside(known)
    second.append(torch.ones(1, 2, 4), 3)
    second.move_to(known)
    assert isinstance(known.joined(), torch.Tensor)
