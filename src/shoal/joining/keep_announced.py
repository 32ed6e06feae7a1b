"""Where and for how long a member announces its swarm on local networks.

By default it does so only for a swarm that is there already: one that it has started, or that it has joined by
addresses of the same network. A laptop that joins the swarm of friends from a café does not tell the café.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shoal.errors import SwarmError
from shoal.joining.invite_code import ways_of
from shoal.joining.lan import Announcement, Lan, is_in_networks, ways_at

if TYPE_CHECKING:
    from shoal.net.own_addresses import Interface

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""How often a member looks whether what it announces, or where, has changed."""
RETRY_SECONDS = 60.0
"""How long it waits after multicast has failed."""


def networks_to_tell(came_by: Sequence[str], interfaces: Sequence[Interface], *, asked: bool | None) -> set[Interface]:
    """The addresses of this machine by which a member announces its swarm, if it can be reached by them.

    `came_by`: the multiaddresses by which it has joined; none if it has started the swarm. `asked`: what the user
    wants, if they said.
    """
    is_told = all(_is_near(each, interfaces) for each in came_by) if asked is None else asked
    return set(interfaces) if is_told else set()


def _is_near(address: str, interfaces: Sequence[Interface]) -> bool:
    """Whether the peer at this multiaddress is on this machine or in one of these networks. A name may be anywhere."""
    if "/p2p-circuit" in address or not (ways := ways_of([address])):
        return False
    host = ways[0].host
    return ipaddress.ip_address(host).is_loopback or is_in_networks(host, interfaces)


async def keep_announced(
    lan: Lan,
    told: set[Interface],
    *,
    own: Callable[[], Sequence[Interface]],
    addresses: Callable[[], Sequence[str]],
    describe: Callable[[Sequence[Interface]], Announcement | None],
    report: Callable[[Sequence[Interface]], None],
) -> None:
    """Announce a swarm by the interfaces `told`, while this machine has them, until this is cancelled.

    `own`: this machine's interfaces now. `addresses`: the multiaddresses at which the member can be reached now.
    `describe`: what it announces by some interfaces now. `report` is called when an announcement has begun. Networks
    that the machine enters later are not told. Without multicast, a warning is logged once.
    """

    def where() -> tuple[Interface, ...]:
        here, reached = [each for each in own() if each in told], addresses()
        return tuple(each for each in here if ways_at(reached, [each]))

    log_failure = log.warning
    while told:
        try:
            if interfaces := where():
                await _announce(lan, interfaces, where, describe, report)
            else:
                await asyncio.sleep(LOOK_SECONDS)
        except SwarmError as failure:
            log_failure("this swarm is not announced on the local network: %s", failure)
            log_failure = log.debug
            await asyncio.sleep(RETRY_SECONDS)


async def _announce(
    lan: Lan,
    interfaces: tuple[Interface, ...],
    where: Callable[[], tuple[Interface, ...]],
    describe: Callable[[Sequence[Interface]], Announcement | None],
    report: Callable[[Sequence[Interface]], None],
) -> None:
    """Announce by these interfaces, until the member is not reached by them any more or is reached by others."""
    async with lan.announcing(interfaces) as publish:
        announced = None
        while where() == interfaces:
            now = describe(interfaces)
            if now is not None and now != announced:
                await publish(now)
                if announced is None:
                    report(interfaces)
                announced = now
            await asyncio.sleep(LOOK_SECONDS)
