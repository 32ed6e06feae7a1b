"""`shoal invite`: a fresh invite code for each model of a swarm, from any machine that is in it or knows an address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from shoal.cli import options
from shoal.cli.terminal.console import start_logging, waiting
from shoal.errors import SwarmError
from shoal.joining.invite_code import InviteCode, ways_of
from shoal.net import NetworkConfig, check_addresses

if TYPE_CHECKING:
    from shoal.joining.invitation import Invitation
    from shoal.net.transport import Node

MOST_WAYS = 3


def command(initial_peers: options.InitialPeers = None, verbose: options.Verbose = False) -> None:
    """Print an invite code for each model of a swarm: `shoal join CODE` lets another machine serve it too.

    The code has the addresses of several members that are there now, so that it outlives some of them.
    """
    start_logging(verbose=verbose)
    network = NetworkConfig(initial_peers=options.swarm_peers(initial_peers), client_mode=True)
    check_addresses(network)
    with waiting("Asking the members"):
        found = asyncio.run(_codes(network))
    if not found:
        raise SwarmError(
            "no member of this swarm can invite others yet",
            hint="a server can when it has read its weights once; `shoal status` shows who serves what",
        )
    for invitation, code in found:
        print(f"{invitation.model} in {invitation.dtype}:\n  shoal join {code}")


async def _codes(network: NetworkConfig) -> list[tuple[Invitation, InviteCode]]:
    from shoal.net import join

    async with join(network) as node:
        return [each async for each in _invitations(node)]


async def _invitations(node: Node) -> AsyncIterator[tuple[Invitation, InviteCode]]:
    from shoal.joining.requests import NoAnswer, member

    for model in await node.directory.models():
        servers = await node.directory.servers(model)
        members: dict[Invitation, list[str]] = {}
        for server in servers:
            try:
                async with member(node.transport, server.peer, server.addresses) as host:
                    members.setdefault(await host.invitation(), []).extend(server.addresses)
            except (NoAnswer, SwarmError):
                continue
        for invitation, addresses in members.items():
            if ways := ways_of(addresses, most=MOST_WAYS):
                yield invitation, InviteCode(invitation.digest, ways)
