"""Fetches the invitations of swarms that were heard: a list shows what a code stands for, and not what was said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from shoal.concurrency import owned_task
from shoal.errors import SwarmError
from shoal.joining.asking import first_answer, invitation_from
from shoal.joining.heard_swarms import HeardSwarm
from shoal.joining.invitation import Invitation
from shoal.joining.lan import is_in_networks
from shoal.joining.requests import Member
from shoal.net import NetworkConfig, find_peers, join
from shoal.net.transport import Node

if TYPE_CHECKING:
    from shoal.net.own_addresses import Interface

DIAL_SECONDS = 2.0
"""How long a member on the local network may take to answer a connection. One that is gone does not answer at all."""
CHECK_SECONDS = 6.0
"""How long checking may take, with the start of the network. What is not checked by then is listed as it was said."""


class Dialler(Protocol):
    """How members are reached; tests have a network in memory."""

    async def find(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """The addresses with the ids of the peers that answer there."""

    def node(self) -> AbstractAsyncContextManager[Node]:
        """Access to the network, by which any peer can be asked, in no swarm."""


class Libp2pDialler:
    """Dials over libp2p."""

    async def find(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """See `Dialler`."""
        return await find_peers(addresses, seconds=DIAL_SECONDS)

    @asynccontextmanager
    async def node(self) -> AsyncIterator[Node]:
        """See `Dialler`."""
        async with join(NetworkConfig(client_mode=True)) as node:
            yield node


async def checked(
    swarms: Sequence[HeardSwarm], interfaces: Sequence[Interface], dialler: Dialler, *, seconds: float = CHECK_SECONDS
) -> tuple[HeardSwarm, ...]:
    """The swarms, each with its invitation if a member gives it in time, and with the ways to such members first.

    Only hosts in the networks of these interfaces are dialled: an announcement cannot make this machine contact others.
    """
    found: dict[str, HeardSwarm] = {}

    async def check_all() -> None:
        near = {way.address for swarm in swarms for way in swarm.ways if is_in_networks(way.host, interfaces)}
        async with owned_task(dialler.find(sorted(near))) as finding, dialler.node() as node:
            peers = {address.rpartition("/p2p/")[0]: address for address in await finding}
            async with asyncio.TaskGroup() as tasks:
                for swarm in swarms:
                    tasks.create_task(check_one(node, swarm, peers))

    async def check_one(node: Node, swarm: HeardSwarm, peers: Mapping[str, str]) -> None:
        good: set[str] = set()

        async def ask(host: Member) -> Invitation:
            invitation = await invitation_from(host, swarm.digest)
            good.add(host.peer)
            return invitation

        at = {way: address for way in swarm.ways if (address := peers.get(way.address))}
        places = {peer_in(address): (address,) for address in at.values()}
        invitation, _ = await first_answer(node, list(places.items()), ask)
        if invitation is not None:
            first = [way for way in swarm.ways if way in at and peer_in(at[way]) in good]
            found[swarm.digest] = replace(
                swarm, invitation=invitation, ways=tuple(dict.fromkeys((*first, *swarm.ways)))
            )

    with contextlib.suppress(TimeoutError, SwarmError):
        async with asyncio.timeout(seconds):
            await check_all()
    return tuple(found.get(swarm.digest, swarm) for swarm in swarms)


def peer_in(address: str) -> str:
    """The peer id at the end of an address."""
    return address.rpartition("/")[2]
