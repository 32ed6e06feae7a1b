"""Where a member announces its swarm, and until when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.keep_announced import LOOK_SECONDS, RETRY_SECONDS, keep_announced, networks_to_tell
from shoal.joining.lan import Announcement
from shoal.net.own_addresses import Interface
from shoal.spans import Span

from . import virtual_time
from .lan_in_memory import HOME, OFFICE, LanInMemory, announcement

PEER = "12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
BOTH = {HOME, OFFICE}


def at(host: str) -> str:
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/4001/p2p/{PEER}"


@pytest.mark.parametrize(
    ("came_by", "asked", "expected"),
    [
        ([], None, BOTH),
        ([at("192.168.1.9")], None, BOTH),
        ([at("192.168.1.9"), at("10.0.200.1")], None, BOTH),
        ([at("127.0.0.1")], None, BOTH),
        (["/ip4/192.168.1.9/tcp/4001"], None, BOTH),
        ([at("203.0.113.5")], None, set()),
        ([at("192.168.1.9"), at("203.0.113.5")], None, set()),
        ([at("192.168.2.9")], None, set()),
        ([f"/dns4/example.org/tcp/4001/p2p/{PEER}"], None, set()),
        ([f"{at('192.168.1.9')}/p2p-circuit/p2p/{PEER}"], None, set()),
        ([at("203.0.113.5")], True, BOTH),
        ([], False, set()),
    ],
)
def test_a_swarm_is_announced_where_it_is_unless_the_user_says_otherwise(
    came_by: list[str], asked: bool | None, expected: set[Interface]
) -> None:
    assert networks_to_tell(came_by, [HOME, OFFICE], asked=asked) == expected


class Member:
    """A member that announces its swarm: the interfaces that its machine has, and the addresses it is reached at."""

    def __init__(self, lan: LanInMemory, *, told: set[Interface]) -> None:
        self.lan, self.told = lan, told
        self.own: list[Interface] = [HOME]
        self.addresses = [at("192.168.1.5"), at("10.0.7.5"), at("127.0.0.1")]
        self.says: Announcement | None = announcement(host="192.168.1.5")
        self.reported: list[Sequence[Interface]] = []

    async def live(self) -> None:
        await keep_announced(
            self.lan,
            self.told,
            own=lambda: self.own,
            addresses=lambda: self.addresses,
            describe=lambda interfaces: self.says,
            report=self.reported.append,
        )


Scene = Callable[[Member], Awaitable[None]]


def play(scene: Scene, *, told: set[Interface] | None = None) -> Member:
    """A member announces its swarm while the scene lasts, and is cancelled after it."""
    member = Member(LanInMemory(), told={HOME} if told is None else told)

    async def run() -> None:
        task = asyncio.create_task(member.live())
        await scene(member)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    virtual_time.run(run())
    return member


async def looks(times: int = 1) -> None:
    """Let a member look this often whether something has changed."""
    await asyncio.sleep((times + 0.5) * LOOK_SECONDS)


def test_a_member_announces_its_swarm_and_takes_that_back_when_it_ends() -> None:
    async def scene(member: Member) -> None:
        await looks(3)
        assert list(member.lan.records) == ["me"]

    member = play(scene)
    assert member.lan.published == [member.says]
    assert member.reported == [(HOME,)]
    assert member.lan.records == {}


def test_what_is_announced_follows_the_code_and_the_blocks() -> None:
    first = announcement(host="192.168.1.5")
    moved = replace(first, span=Span(0, 6))
    renewed = replace(moved, code=InviteCode(first.code.digest, (Way("192.168.1.5", 5000),)))

    async def scene(member: Member) -> None:
        for says in (first, moved, renewed, None):  # a server that changes its blocks may have none for a while
            member.says = says
            await looks()

    member = play(scene)
    assert member.lan.published == [first, moved, renewed]
    assert len(member.reported) == member.lan.attempts == 1


def test_a_network_that_the_machine_enters_later_is_not_told() -> None:
    cafe = OFFICE

    async def scene(member: Member) -> None:
        await looks()
        member.own = [cafe]
        await looks(2)
        assert member.lan.records == {}
        member.own = [cafe, HOME]
        await looks(2)
        assert list(member.lan.records) == ["me"]

    assert play(scene).lan.where == [(HOME,), (HOME,)]


def test_a_server_that_listens_on_one_address_is_announced_by_that_one_only() -> None:
    async def scene(member: Member) -> None:
        member.own, member.addresses = [HOME, OFFICE], [at("10.0.7.5")]
        await looks()

    assert play(scene, told=BOTH).lan.where == [(OFFICE,)]


@pytest.mark.parametrize("addresses", [[at("127.0.0.1")], [at("203.0.113.5")], [at("::1")], []])
def test_a_server_that_the_local_network_cannot_reach_is_not_announced(addresses: list[str]) -> None:
    async def scene(member: Member) -> None:
        member.addresses = addresses
        await looks(3)

    assert play(scene).lan.attempts == 0


def test_without_multicast_one_line_says_so_and_the_member_tries_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(member: Member) -> None:
        member.lan.is_broken = True
        await asyncio.sleep(2.5 * RETRY_SECONDS)
        assert member.lan.attempts == 3
        member.lan.is_broken = False
        await asyncio.sleep(RETRY_SECONDS)

    with caplog.at_level(logging.WARNING, logger="shoal"):
        member = play(scene)
    assert [record.getMessage() for record in caplog.records] == [
        "this swarm is not announced on the local network: there is no multicast"
    ]
    assert member.lan.published == [member.says]


def test_where_nothing_is_told_nothing_is_waited_for() -> None:
    member = Member(LanInMemory(), told=set())
    virtual_time.run(member.live())
    assert member.lan.attempts == 0
