"""Announces a server's swarm on the local networks where it is, for as long as the server serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.joining.invite_code import InviteCode
from shoal.net import NetworkConfig

if TYPE_CHECKING:
    from shoal.joining.lan import Announcement
    from shoal.net.own_addresses import Interface
    from shoal.server.server import Server

log = logging.getLogger(__name__)

OnLan = Annotated[
    bool | None,
    typer.Option(
        "--lan/--no-lan",
        help="Announce the swarm on the local network: `shoal join` lists it there. Default: if it is a swarm of that "
        "network.",
    ),
]


def came_by(code: InviteCode | None, network: NetworkConfig) -> tuple[str, ...]:
    """The multiaddresses by which a machine joins a swarm; none if it starts one."""
    return (*network.initial_peers, *(() if code is None else code.addresses))


async def announce_swarm(server: Server, by: Sequence[str], *, asked: bool | None) -> None:
    """Announce it once the server can invite others, and take that back when this is cancelled.

    `by`: the multiaddresses by which the server has joined. `asked`: what the user wants; None if they said nothing. A
    failure is logged and ends nothing.
    """
    if asked is False:
        return
    try:
        await _announce(server, by, asked=asked)
    except Exception:  # a defect must not end a server that serves
        log.exception("this swarm is not announced on the local network")


async def _announce(server: Server, by: Sequence[str], *, asked: bool | None) -> None:
    from shoal.joining.keep_announced import keep_announced, networks_to_tell
    from shoal.joining.lan import announcement_of, ways_at
    from shoal.net.own_addresses import lan_interfaces

    told = networks_to_tell(by, lan_interfaces(), asked=asked)
    if not ways_at(server.info.addresses, list(told)):
        if asked:
            log.warning("this swarm is not announced: the server has no address in a local network")
        return
    await asyncio.wait({server.invitation})
    invitation = server.invitation.result()

    def describe(interfaces: Sequence[Interface]) -> Announcement | None:
        info = server.info
        return announcement_of(invitation, info.addresses, interfaces, info.span, server.model.num_blocks)

    from shoal.joining.multicast import MulticastLan

    await keep_announced(
        MulticastLan(),
        told,
        own=lan_interfaces,
        addresses=lambda: server.info.addresses,
        describe=describe,
        report=_tell,
    )


def _tell(interfaces: Sequence[Interface]) -> None:
    networks = ", ".join(sorted({str(each.network) for each in interfaces}))
    print(f"{'lan':<10}announced in {networks}: `shoal join` lists it there (--no-lan: it does not)", flush=True)
