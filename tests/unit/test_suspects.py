from __future__ import annotations

from shoal.client.suspects import AVOID_SECONDS, BAR_SECONDS, LONGEST_SECONDS, Suspects


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_suspect_is_avoided_at_once_barred_shortly_and_forgiven_when_it_answers():
    clock = Clock()
    suspects = Suspects(clock)
    suspects.lost("a", "it hung up")
    assert suspects.avoided("a")
    assert suspects.barred("a")
    assert not suspects.avoided("b")
    clock.now = BAR_SECONDS
    assert suspects.avoided("a")
    assert not suspects.barred("a")
    clock.now = AVOID_SECONDS
    assert not suspects.avoided("a")
    suspects.lost("a", "again")
    suspects.forgive("a")
    assert not suspects.avoided("a")


def test_suspicion_doubles_with_every_failure_up_to_a_limit():
    clock = Clock()
    suspects = Suspects(clock)
    for growth in (1, 2, 4):
        suspects.lost("a", "it hung up")
        assert suspects.seconds_left() == BAR_SECONDS * growth
    for _ in range(100):
        suspects.lost("a", "it hung up")
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
    suspects.lost("a", "it hung up")
    assert suspects.seconds_left() == BAR_SECONDS
