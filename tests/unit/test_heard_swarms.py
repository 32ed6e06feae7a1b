"""What a machine that listens makes of what it hears."""

from __future__ import annotations

import asyncio
import logging

import pytest

from shoal.errors import SwarmError
from shoal.joining.heard_swarms import (
    MAX_ANNOUNCEMENTS,
    MAX_WAYS_TRIED,
    MOST_SECONDS,
    NOTHING_SECONDS,
    QUIET_SECONDS,
    HeardSwarm,
    Hearing,
    listen,
)
from shoal.joining.invite_code import InviteCode
from shoal.joining.lan import Announcement

from . import virtual_time
from .lan_in_memory import DIGEST, HOME, LanInMemory, announcement, as_heard

OTHER = "fedcba9876543210"


def heard(*said: Announcement) -> tuple[HeardSwarm, ...]:
    hearing = Hearing()
    for number, each in enumerate(said):
        hearing.take(f"member-{number}", as_heard(each))
    return hearing.swarms


def test_a_swarm_that_several_members_announce_is_heard_once() -> None:
    (swarm,) = heard(announcement("0:4", host="192.168.1.7"), announcement("8:12", host="192.168.1.8"))
    assert (swarm.digest, swarm.model, swarm.num_members) == (DIGEST, "stories", 2)
    assert [way.host for way in swarm.ways] == ["192.168.1.7", "192.168.1.8"]
    assert swarm.missing == (4, 5, 6, 7)
    assert InviteCode.parse(str(swarm.code())) == InviteCode(DIGEST, swarm.ways)


def test_swarms_with_other_digests_are_others_and_the_larger_one_stands_first() -> None:
    first, second = heard(
        announcement(digest=OTHER, model="a"), announcement(model="b"), announcement(model="b", port=4002)
    )
    assert (first.digest, first.num_members) == (DIGEST, 2)
    assert (second.digest, second.num_members) == (OTHER, 1)


def test_what_most_members_say_of_a_swarm_is_shown() -> None:
    (swarm,) = heard(announcement(model="lie"), announcement(port=4002), announcement(port=4003))
    assert swarm.model == "stories"
    assert swarm.num_members == 3


def test_each_member_has_a_way_in_before_any_has_two() -> None:
    many = InviteCode(DIGEST, tuple(announcement(port=port).code.ways[0] for port in range(1, 8)))
    loud = Announcement(many, "stories", "float32", "none", announcement().span, 12)
    (swarm,) = heard(loud, announcement(host="192.168.1.8"), announcement(host="192.168.1.9"))
    assert [way.host for way in swarm.ways[:3]] == ["192.168.1.7", "192.168.1.8", "192.168.1.9"]
    assert len(swarm.ways) == MAX_WAYS_TRIED


def test_a_member_that_says_something_else_or_goodbye_has_not_said_the_former() -> None:
    hearing = Hearing()
    hearing.take("a", as_heard(announcement("0:6")))
    hearing.take("a", as_heard(announcement("6:12", digest=OTHER)))
    assert [swarm.digest for swarm in hearing.swarms] == [OTHER]
    hearing.take("a", None)
    assert (hearing.swarms, hearing.num_members) == ((), 0)
    hearing.take("never heard", None)
    assert hearing.num_members == 0


def test_a_record_that_is_none_is_left_out_and_takes_back_the_former(caplog: pytest.LogCaptureFixture) -> None:
    hearing = Hearing()
    hearing.take("a", as_heard(announcement()))
    with caplog.at_level(logging.DEBUG, logger="shoal.joining.heard_swarms"):
        hearing.take("a", as_heard(announcement(), code="nonsense"))
    assert hearing.num_members == 0
    assert "announces no swarm" in caplog.text


def test_no_more_than_a_limit_is_kept_of_what_is_announced() -> None:
    hearing = Hearing()
    for number in range(MAX_ANNOUNCEMENTS + 50):
        hearing.take(f"member-{number}", as_heard(announcement(digest=f"{number:016x}")))
    assert hearing.num_members == len(hearing.swarms) == MAX_ANNOUNCEMENTS


def listened(lan: LanInMemory, *later: tuple[float, str]) -> tuple[tuple[HeardSwarm, ...], float, list[int]]:
    """What is heard while members of these names announce themselves at these times; when it ended; what was shown."""
    shown: list[int] = []

    async def scene() -> tuple[tuple[HeardSwarm, ...], float]:
        loop = asyncio.get_running_loop()
        for at, name in later:
            loop.call_at(at, lan.say, name, as_heard(announcement(port=4000 + len(name))))
        found = await listen(lan, [HOME], report=lambda hearing: shown.append(hearing.num_members))
        return found, loop.time()

    found, ended = virtual_time.run(scene())
    return found, ended, shown


def test_a_machine_that_hears_nothing_stops_listening_after_a_while() -> None:
    assert listened(LanInMemory()) == ((), NOTHING_SECONDS, [])


def test_a_machine_listens_until_no_further_member_is_heard() -> None:
    (swarm,), ended, shown = listened(LanInMemory(), (1.0, "a"), (2.0, "bb"), (2.0 + 2 * QUIET_SECONDS, "ccc"))
    assert swarm.num_members == 2
    assert ended == 2.0 + QUIET_SECONDS
    assert shown == [1, 2]


def test_a_member_that_never_stops_talking_does_not_keep_a_machine_listening() -> None:
    _, ended, _ = listened(LanInMemory(), *((at / 2, "a" * at) for at in range(1, 100)))
    assert ended == MOST_SECONDS


def test_a_machine_without_multicast_is_told() -> None:
    lan = LanInMemory()
    lan.is_broken = True
    with pytest.raises(SwarmError, match="no multicast"):
        listened(lan)
