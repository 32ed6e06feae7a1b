"""Announces a server's swarm on the local networks where it is, for as long as the server serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.joining.lan import Announcement, Lan
    from shoal.net.addressing.own_addresses import Interface
    from shoal.server.server import Server

log = logging.getLogger(__name__)


async def announce_swarm(
    server: Server,
    by: Sequence[str],
    *,
    asked: bool | None,
    lan: Lan | None = None,
    own: Callable[[], Sequence[Interface]] | None = None,
) -> None:
    """Announce it once the server can invite others, and take that back when this is cancelled.

    `by`: the multiaddresses by which the server has joined. `asked`: what the user wants; None if they said nothing.
    `lan` and `own` are multicast DNS and this machine's interfaces, except in tests. A failure is logged and ends
    nothing.
    """
    if asked is False:
        return
    try:
        await _announce(server, by, asked=asked, lan=lan, own=own)
    except Exception:  # a defect must not end a server that serves
        log.exception("this swarm is not announced on the local network")


async def _announce(
    server: Server,
    by: Sequence[str],
    *,
    asked: bool | None,
    lan: Lan | None,
    own: Callable[[], Sequence[Interface]] | None,
) -> None:
    from shoal.joining.keep_announced import keep_announced, networks_to_tell
    from shoal.joining.lan import announcement_of, ways_at
    from shoal.net.addressing.own_addresses import lan_interfaces

    own = own or lan_interfaces
    told = networks_to_tell(by, own(), asked=asked)
    if not ways_at(server.info.addresses, list(told)):
        if asked:
            log.warning("this swarm is not announced: the server has no address in a local network")
        return
    await asyncio.wait({server.invitation})
    invitation = server.invitation.result()

    def describe(interfaces: Sequence[Interface]) -> Announcement | None:
        info = server.info
        return announcement_of(invitation, info.addresses, interfaces, info.span, server.model.num_blocks)

    if lan is None:
        from shoal.joining.multicast import MulticastLan

        lan = MulticastLan()
    await keep_announced(lan, told, own=own, addresses=lambda: server.info.addresses, describe=describe, report=_tell)


def _tell(interfaces: Sequence[Interface]) -> None:
    networks = ", ".join(sorted({str(each.network) for each in interfaces}))
    print(f"{'lan':<10}announced in {networks}: `shoal join` lists it there (--no-lan: it does not)", flush=True)
