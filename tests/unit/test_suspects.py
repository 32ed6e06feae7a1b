from __future__ import annotations

from shoal.client.suspects import AVOID_SECONDS, BAR_SECONDS, LONGEST_SECONDS, Suspects


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_suspect_is_avoided_at_once_barred_shortly_and_forgiven_when_it_answers():
    clock = Clock()
    suspects = Suspects(clock)
    suspects.lost("a", "it hung up", since=clock.now)
    assert suspects.avoided("a")
    assert suspects.barred("a")
    assert not suspects.avoided("b")
    clock.now = BAR_SECONDS
    assert suspects.avoided("a")
    assert not suspects.barred("a")
    clock.now = AVOID_SECONDS
    assert not suspects.avoided("a")
    suspects.lost("a", "again", since=clock.now)
    suspects.forgive("a")
    assert not suspects.avoided("a")


def test_suspicion_doubles_with_every_failure_up_to_a_limit():
    clock = Clock()
    suspects = Suspects(clock)
    for growth in (1, 2, 4):
        suspects.lost("a", "it hung up", since=clock.now)
        assert suspects.seconds_left() == BAR_SECONDS * growth
    for _ in range(100):
        suspects.lost("a", "it hung up", since=clock.now)
    clock.now = LONGEST_SECONDS
    assert not suspects.avoided("a")


def test_a_busy_server_is_left_alone_until_it_said_and_is_not_blamed():
    clock = Clock()
    suspects = Suspects(clock)
    suspects.busy("a", 3.0, "full")
    assert suspects.barred("a")
    assert suspects.seconds_left() == 3.0
    assert suspects.reasons() == ["a: full"]
    clock.now = 3.0
    assert not suspects.avoided("a")
    suspects.lost("a", "it hung up", since=clock.now)
    assert suspects.seconds_left() == BAR_SECONDS


def test_requests_that_were_under_way_when_a_server_went_are_one_failure():
    clock = Clock()
    suspects = Suspects(clock)
    clock.now = 10.0
    for began in (3.0, 5.0, 9.0):
        suspects.lost("a", "it hung up", since=began)
    assert suspects.seconds_left() == BAR_SECONDS
    clock.now = 11.0
    suspects.lost("a", "it hung up", since=10.5)
    assert suspects.seconds_left() == 2 * BAR_SECONDS
