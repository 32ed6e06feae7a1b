"""What the members of swarms that were heard answer, some of which lie, stall or are not there, in virtual time."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shoal.errors import SwarmError
from shoal.joining.checked_swarms import CHECK_SECONDS, checked
from shoal.joining.heard_swarms import HeardSwarm
from shoal.joining.invitation import Invitation
from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.lan import Announcement
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node, Stream
from shoal.net.wire import codec
from shoal.protocol import REQUEST_KINDS, InvitationText
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.server.rpc.weights_service import WeightsService
from shoal.spans import Span

from . import virtual_time

HOME = [ipaddress.IPv4Interface("192.168.1.5/24")]
STORIES, OTHER = (
    Invitation(name, "llama-12x64-0a1b2c3d", "f" * 32, "bfloat16", "nf4") for name in ("stories", "other")
)
Answer = Callable[[Stream], Coroutine[Any, Any, None]]


def heard(digest: str, *hosts: str) -> HeardSwarm:
    ways = tuple(Way(host, 4001) for host in hosts)
    says = Announcement(InviteCode(digest, ways[:1]), "made up", "float32", "none", Span(0, 12), 12)
    return HeardSwarm(digest, ways, says, num_members=len(hosts))


class Home:
    """A local network with members at its addresses, and a machine that asks them."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.dialled: list[str] = []
        self.finding_takes = 0.0
        self.is_down = False

    async def add(self, host: str, answer: Invitation | Answer) -> None:
        """A member at this address, which is also its name; it has this invitation, or its own way to answer."""
        node = self.network.node(host)
        if isinstance(answer, Invitation):
            weights = WeightsService(upload_limit=None)
            weights.offer(answer, None)
            engine = SimpleNamespace(
                num_passes=0,
                queue_length=0,
                cache_tokens_left=0,
                passes=SimpleNamespace(release=lambda peer: None),
                validator=SimpleNamespace(check_declared=lambda message: None),
            )
            answer = Handler(cast(Any, engine), PushService(node.transport), idle_seconds=300.0, weights=weights)
        await node.transport.listen(answer)

    async def find(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """See `Dialler`."""
        self.dialled += addresses
        await asyncio.sleep(self.finding_takes)
        hosts = {address: address.split("/")[2] for address in addresses}
        return tuple(f"{address}/p2p/{host}" for address, host in hosts.items() if host in self.network.peers)

    @asynccontextmanager
    async def node(self) -> AsyncIterator[Node]:
        """See `Dialler`."""
        if self.is_down:
            raise SwarmError("the network could not be started")
        yield self.network.node("me", is_client=True)


def check(
    swarms: Sequence[HeardSwarm], arrange: Callable[[Home], Coroutine[Any, Any, None]]
) -> tuple[tuple[HeardSwarm, ...], Home, float]:
    """The swarms after they were checked, the network that was arranged for it, and the time that it took."""
    home = Home()

    async def play() -> tuple[tuple[HeardSwarm, ...], float]:
        await arrange(home)
        try:
            return await checked(swarms, HOME, home), asyncio.get_running_loop().time()
        finally:
            await home.network.close()

    found, took = virtual_time.run(play())
    return found, home, took


async def silent(stream: Stream) -> None:
    await asyncio.Event().wait()


async def lies(stream: Stream) -> None:
    await codec.receive(stream, REQUEST_KINDS)
    await codec.send(stream, InvitationText(text=OTHER.text))


async def babbles(stream: Stream) -> None:
    await codec.receive(stream, REQUEST_KINDS)
    await codec.send(stream, InvitationText(text="{}"))


def test_the_invitation_and_not_what_was_said_describes_a_swarm() -> None:
    async def arrange(home: Home) -> None:
        await home.add("192.168.1.7", STORIES)
        await home.add("192.168.1.8", OTHER)

    swarms = [heard(OTHER.digest, "192.168.1.8"), heard(STORIES.digest, "192.168.1.7")]
    assert [each.model for each in swarms] == ["made up", "made up"]
    (other, stories), _, _ = check(swarms, arrange)
    assert (other.invitation, stories.invitation) == (OTHER, STORIES)
    assert (stories.model, stories.dtype, stories.quantization) == ("stories", "bfloat16", "nf4")


@pytest.mark.parametrize("answer", [silent, lies, babbles, OTHER])
def test_a_member_that_cannot_prove_the_code_leaves_a_swarm_as_it_was_said(answer: Invitation | Answer) -> None:
    async def arrange(home: Home) -> None:
        await home.add("192.168.1.7", answer)

    swarm = heard(STORIES.digest, "192.168.1.7")
    found, _, took = check([swarm], arrange)
    assert found == (swarm,)
    assert took < CHECK_SECONDS + 0.001


def test_members_that_prove_the_code_come_first_in_it() -> None:
    async def arrange(home: Home) -> None:
        await home.add("192.168.1.7", lies)
        await home.add("192.168.1.9", STORIES)

    hosts = ("192.168.1.7", "192.168.1.8", "192.168.1.9")
    (found,), _, _ = check([heard(STORIES.digest, *hosts)], arrange)
    assert found.invitation == STORIES
    assert [way.host for way in found.ways] == ["192.168.1.9", "192.168.1.7", "192.168.1.8"]


def test_a_swarm_that_stalls_does_not_hide_another() -> None:
    async def arrange(home: Home) -> None:
        await home.add("192.168.1.7", silent)
        await home.add("192.168.1.8", OTHER)

    (stalls, other), _, took = check(
        [heard(STORIES.digest, "192.168.1.7"), heard(OTHER.digest, "192.168.1.8")], arrange
    )
    assert (stalls.invitation, other.invitation) == (None, OTHER)
    assert took == pytest.approx(CHECK_SECONDS)


def test_an_announcement_makes_a_machine_dial_its_local_network_only() -> None:
    async def arrange(home: Home) -> None:
        await home.add("203.0.113.5", STORIES)

    hosts = ("203.0.113.5", "127.0.0.1", "10.0.0.1", "0.0.0.0", "::1", "fe80::1", "192.168.1.255", "224.0.0.251")
    swarm = heard(STORIES.digest, *hosts)
    found, home, _ = check([swarm], arrange)
    assert found == (swarm,)
    assert home.dialled == ["/ip4/192.168.1.255/tcp/4001"]


@pytest.mark.parametrize("change", [{"is_down": True}, {"finding_takes": 2 * CHECK_SECONDS}])
def test_without_a_network_in_time_swarms_are_listed_as_they_were_said(change: dict[str, Any]) -> None:
    async def arrange(home: Home) -> None:
        for name, value in change.items():
            setattr(home, name, value)

    swarm = heard(STORIES.digest, "192.168.1.7")
    assert check([swarm], arrange)[0] == (swarm,)
