"""`shoal invite`: a fresh invite code for each model of a swarm, from any machine that is in it or knows an address."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import network_options, options
from shoal.cli.network_options import network_of
from shoal.cli.terminal.console import WrongUsage, start_logging, stderr, waiting
from shoal.errors import SwarmError
from shoal.joining.invite_code import PRINTED_WAYS, InviteCode, code_in, in_turn, ways_of
from shoal.net import NetworkConfig

if TYPE_CHECKING:
    from shoal.joining.invitation import Invitation
    from shoal.net.transport import Node
    from shoal.peers import ModelInfo

MOST_ASKED = 32
"""Members that are asked: enough to see what most of them say."""


def command(
    swarm: Annotated[
        str | None, typer.Argument(metavar="CODE", help="An invite code of the swarm, in place of --initial-peers.")
    ] = None,
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    verbose: options.Verbose = False,
) -> None:
    """Print an invite code for each model of a swarm: `shoal join CODE` lets another machine serve it too.

    The code has the addresses of several members that are there now, so that it outlives some of them. It is for the
    weights that most members have. The code of a closed swarm has its key: who has the code is let in.
    """
    start_logging(verbose=verbose)
    code = None if swarm is None else code_in(swarm)
    if swarm is not None and code is None:
        raise WrongUsage(f"{swarm!r} is not an invite code", hint="name a swarm by its code, or by --initial-peers")
    if code is not None and initial_peers:
        raise WrongUsage("an invite code says where its swarm is", hint="leave out --initial-peers, or the code")
    network = network_of(
        initial_peers=options.swarm_peers(initial_peers) if code is None else (),
        client_mode=True,
        swarm_key=swarm_key if code is None else network_options.key_beside_code(swarm_key),
    )
    with waiting("Asking the members"):
        if code is not None:
            from shoal.joining.arrival import network_by

            network = asyncio.run(network_by(code, network))
        found = asyncio.run(_invitations(network))
    if not found:
        raise SwarmError(
            "no member of this swarm can invite others yet",
            hint="a server can when it has read its weights once; `shoal status` shows who serves what",
        )
    for members in found:
        (invitation, addresses), *others = sorted(members.items(), key=lambda item: len(item[1]), reverse=True)
        if not (ways := ways_of(in_turn(*addresses), most=PRINTED_WAYS)):
            continue
        print(f"{invitation.model} in {invitation.dtype}, weights {invitation.fingerprint}, {len(addresses)} members:")
        print(f"  shoal join {InviteCode(invitation.digest, ways, network.swarm_key)}")
        if others:
            number = sum(len(each) for _, each in others)
            stderr.print(f"{number} other members invite with something else", style="yellow")


async def _invitations(network: NetworkConfig) -> list[dict[Invitation, list[tuple[str, ...]]]]:
    """For each model: what its members invite with, each with the addresses of each of these members."""
    from shoal.net import join

    async with join(network) as node:
        found = [await _of_model(node, model) for model in await node.directory.models()]
        return [each for each in found if each]


async def _of_model(node: Node, model: ModelInfo) -> dict[Invitation, list[tuple[str, ...]]]:
    from shoal.joining.requests import NoAnswer, member

    servers = await node.directory.servers(model)
    fingerprints = Counter(server.fingerprint for server in servers)
    members: dict[Invitation, list[tuple[str, ...]]] = defaultdict(list)
    for server in servers[:MOST_ASKED]:
        if fingerprints[server.fingerprint] < max(fingerprints.values()):
            continue
        try:
            async with member(node.transport, server.peer, server.addresses) as host:
                invitation = await host.invitation()
        except (NoAnswer, SwarmError):
            continue
        if (invitation.key, invitation.fingerprint) == (model.key, server.fingerprint):
            members[invitation].append(server.addresses)
    return members
