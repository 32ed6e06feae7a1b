"""Servers fail in any way at any moment: clients compute what is right, nothing hangs, and nothing is left over."""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest
from hypothesis import HealthCheck, given, settings

from .schedules.failures import KINDS, Failure
from .schedules.schedule import Schedule, play
from .schedules.strategies import schedules

NUM_EXAMPLES = int(os.environ.get("SHOAL_SCHEDULES", "0"))
"""The number of new random schedules to play, instead of the fixed ones."""


pytestmark = pytest.mark.usefixtures("no_log_lines")


@settings(
    max_examples=NUM_EXAMPLES or 60,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(schedules())
def test_any_schedule_ends_well(schedule: Schedule):
    play(schedule)


# -- each kind of failure, at each moment, on each hop -----------------------------------------------------------------

FAST = ("0:1", "1:3", "3:4")
"""Servers s0, s1 and s2 are asked first; s3, s4 and s5 can take their places, with other cuts."""
RESERVES = ("0:2", "2:4", "0:4")
MOMENTS = {
    "opening": ("short", Failure("", after=1, phase="prefill")),
    "prefill": ("long", Failure("", after=3, phase="prefill")),
    "decode": ("short", Failure("", after=3, phase="decode")),
    "decode, while it computes": ("short", Failure("", after=3, late=0.01, phase="decode")),
    "several steps under way": ("rounds", Failure("", after=3, phase="decode")),
    "the same, while one is computed": ("rounds", Failure("", after=7, late=0.01, phase="decode")),
    "idle": ("turns", Failure("", phase="idle")),
    "forward": ("training", Failure("", after=1, late=0.01, phase="forward")),
    "backward": ("training", Failure("", after=1, phase="backward")),
}


HOPS = ("s0", "s1", "s2")


def on_one_hop(moments: Collection[str]) -> list[tuple[str, str, str]]:
    """Each kind of failure at each moment on one hop, so that all meet all hops; beside random schedules, on each."""
    return [
        (kind, moment, hop)
        for row, kind in enumerate(KINDS)
        for column, moment in enumerate(moments)
        for place, hop in enumerate(HOPS)
        if NUM_EXAMPLES or (row + column + place) % len(HOPS) == 0
    ]


@pytest.mark.parametrize(("kind", "moment", "hop"), on_one_hop(MOMENTS))
def test_each_failure_at_each_moment(kind: str, moment: str, hop: str):
    work, when = MOMENTS[moment]
    failure = Failure(kind, victim=hop, after=when.after, late=when.late, phase=when.phase)
    story = play(Schedule(FAST, (work,), (failure,), reserves=RESERVES, drain_seconds=5.0))
    assert any(kind in event for event in story)


WITH_ADAPTERS = {
    "forward": ("tuning", Failure("", after=2, late=0.01, phase="forward")),
    "backward": ("tuning", Failure("", after=1, phase="backward")),
    "decode": ("tuned", Failure("", after=3, phase="decode")),
}


@pytest.mark.parametrize("moment", WITH_ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_failure_while_a_clients_adapters_are_computed(kind: str, moment: str):
    work, when = WITH_ADAPTERS[moment]
    failure = Failure(kind, victim="s1", after=when.after, late=when.late, phase=when.phase)
    story = play(Schedule(FAST, (work, "short"), (failure,), reserves=RESERVES, drain_seconds=5.0))
    assert any(kind in event for event in story)


@pytest.mark.parametrize(("kind", "moment", "hop"), on_one_hop(["decode"]))
def test_each_failure_with_standbys(kind: str, moment: str, hop: str):
    failure = Failure(kind, victim=hop, after=6, phase=moment)
    story = play(Schedule(FAST, ("paged",), (failure, failure), reserves=RESERVES, standby=True))
    assert any(kind in event for event in story)


@pytest.mark.parametrize(("kind", "delay", "second"), on_one_hop(["at once", "in the recovery"]))
def test_a_second_failure_on_the_heels_of_the_first(kind: str, delay: str, second: str):
    """At the same moment on another hop, or on the server that has just taken the place of the first."""
    first = "s1" if second != "s1" else "s0"
    victim = {"s0": "s3", "s1": "s4", "s2": "s5"}[second] if delay == "in the recovery" else second
    if delay == "in the recovery":
        first = second
    failures = (Failure("dies", first, after=3, phase="decode"), Failure(kind, victim, after=2 * (victim != second)))
    story = play(Schedule(FAST, ("paged",), failures, reserves=("0:1", "1:3", "3:4")))
    assert any(kind in event for event in story[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", ["paged", "beams", "turns", "training"])
def test_all_servers_fail_in_the_same_way_one_after_another(kind: str, work: str):
    failures = [Failure(kind, "receiver", after=4, lasts=5.0) for _ in range(6)]
    play(Schedule(("0:2", "2:4"), (work, "short"), failures))


# -- what once went wrong ----------------------------------------------------------------------------------------------

DOUBLED = ("0:2", "2:4", "0:2", "2:4")
ONCE_WRONG = {
    "nonsense of one server makes the next reject the client": Schedule(
        FAST, ("short",), (Failure("sends a tensor of another shape", "s0", phase="decode"),)
    ),
    "nonsense of one server is too much for the next": Schedule(
        ("0:2", "2:4"), ("long",), (Failure("sends a tensor of another shape"),)
    ),
    "a standby had computed tokens whose outputs the client never got": Schedule(
        DOUBLED,
        ("paged", "paged"),
        (Failure("dies", after=0, late=1.0), Failure("hangs", "s3")),
        seed=2,
        standby=True,
    ),
    "the same, and other servers fail": Schedule(
        DOUBLED,
        ("paged",),
        (
            Failure("dies"),
            Failure("hangs", "s3"),
            Failure("sends a tensor of another shape"),
            Failure("dies", after=1),
        ),
        standby=True,
    ),
    "a server has forgotten its adapters while a session was opened again": Schedule(
        FAST,
        ("tuned",),
        (Failure("dies", "s1", after=5, late=0.02), Failure("dies", "receiver", after=2, late=0.007)),
        standby=True,
    ),
    "an audit was cancelled when it had just begun to let its servers go": Schedule(
        ("0:1", "1:2", "2:3", "3:4", "0:4"), ("turns",), (Failure("dies", late=0.02),), seed=1
    ),
    "a server that follows itself has no room for two sessions": Schedule(
        ("0:3", "3:4", "0:1", "1:4"),
        ("beams",),
        (
            Failure("is far away", "s3", after=2),
            Failure("sends a tensor of another shape", after=2),
            Failure("sends numbers that are none", "sender", after=3, late=0.001),
            Failure("dies", "s2"),
            Failure("dies", "s3", after=7),
        ),
        cache_pages=10,
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_went_wrong_once_does_not_again(name: str):
    play(ONCE_WRONG[name])


# -- the bed itself ----------------------------------------------------------------------------------------------------


def test_the_same_schedule_goes_the_same_way_twice():
    failures = (Failure("dies", after=9), Failure("hangs", after=3, lasts=3.0), Failure("sends noise", after=2))
    schedule = Schedule(("0:2", "2:4", "1:4"), ("beams", "short"), failures)
    assert play(schedule) == play(schedule)


def test_a_client_without_servers_is_told_so_and_the_story_is_with_the_error():
    with pytest.raises(Exception, match="no server holds blocks 3:4") as error:
        play(Schedule(("0:2", "1:3"), ("short",)))
    assert "client0 fails: MissingBlocks" in error.value.__notes__[0]
