from __future__ import annotations

from shoal.client.swarm.known.peer_health import PeerHealth
from shoal.policy.health import (
    BLOCK_SECONDS,
    DEPRIORITIZE_SECONDS,
    LONGEST_BLOCK_SECONDS,
    LONGEST_SECONDS,
    RECORD_SECONDS,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_server_that_failed_is_deprioritized_at_once_blocked_shortly_and_neither_once_it_succeeds():
    clock = Clock()
    health = PeerHealth(clock)
    health.record_failure("a", "it hung up", since=clock.now)
    assert health.deprioritized("a")
    assert health.blocked("a")
    assert not health.deprioritized("b")
    clock.now = BLOCK_SECONDS
    assert health.deprioritized("a")
    assert not health.blocked("a")
    clock.now = DEPRIORITIZE_SECONDS
    assert not health.deprioritized("a")
    health.record_failure("a", "again", since=clock.now)
    health.record_success("a")
    assert not health.deprioritized("a")


def test_both_times_double_with_every_failure_up_to_a_limit():
    clock = Clock()
    health = PeerHealth(clock)
    for growth in (1, 2, 4):
        health.record_failure("a", "it hung up", since=clock.now)
        assert health.seconds_left() == BLOCK_SECONDS * growth
    for _ in range(100):
        health.record_failure("a", "it hung up", since=clock.now)
    assert health.seconds_left() == LONGEST_BLOCK_SECONDS
    clock.now = LONGEST_SECONDS
    assert not health.deprioritized("a")


def test_a_busy_server_is_not_asked_until_the_time_that_it_named_and_has_not_failed():
    clock = Clock()
    health = PeerHealth(clock)
    health.record_busy("a", 3.0, "full")
    assert health.blocked("a")
    assert health.seconds_left() == 3.0
    assert health.reasons() == ["a: full"]
    clock.now = 3.0
    assert not health.deprioritized("a")
    health.record_failure("a", "it hung up", since=clock.now)
    assert health.seconds_left() == BLOCK_SECONDS


def test_requests_that_were_in_flight_when_a_server_died_are_one_failure():
    clock = Clock()
    health = PeerHealth(clock)
    clock.now = 10.0
    for began in (3.0, 5.0, 9.0):
        health.record_failure("a", "it hung up", since=began)
    assert health.seconds_left() == BLOCK_SECONDS
    clock.now = 11.0
    health.record_failure("a", "it hung up", since=10.5)
    assert health.seconds_left() == 2 * BLOCK_SECONDS


def test_a_server_is_lost_from_its_failure_until_it_answers_or_its_announcement_would_have_expired():
    clock = Clock()
    health = PeerHealth(clock)
    health.record_busy("b", 5.0, "no room")
    assert not health.lost("b")
    health.record_failure("a", "it hung up", since=clock.now)
    clock.now = DEPRIORITIZE_SECONDS
    assert health.lost("a")
    health.record_success("a")
    assert not health.lost("a")
    health.record_failure("a", "it hung up", since=clock.now)
    clock.now += RECORD_SECONDS
    assert not health.lost("a")
