"""Attacks on the routes of a client: servers that announce more than they give."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from benchmarks.abuse.attacked_swarm import ATTACKERS_HOST, AttackedSwarm
from benchmarks.abuse.attacks import Attack
from shoal.errors import SwarmError
from shoal.net import NetworkConfig, join
from shoal.net.transport import MAX_LIFETIME, Stream
from shoal.net.wire import codec
from shoal.peers import ServerInfo
from shoal.protocol import Ping, Pong
from shoal.spans import Span

NUM_SILENT = 64
"""Identities at a silent port. Each has a node of its own for as long as it announces itself."""
AT_ONCE = 4
NUM_UNWILLING = 4


def boastful(swarm: AttackedSwarm, peer: str, addresses: tuple[str, ...]) -> ServerInfo:
    """A record of a server of all blocks, the fastest by its own words."""
    span = Span(0, swarm.model.num_blocks)
    info = replace(swarm.servers[0], peer=peer, addresses=addresses, span=span, round_trips=(), unreached=())
    return replace(info, decode_speed=1e9, prefill_speed=1e9, queue_length=0)


async def silent_servers(swarm: AttackedSwarm) -> None:
    """Many identities at a port that accepts connections and says nothing."""
    port = await asyncio.start_server(lambda reader, writer: asyncio.sleep(1e6), ATTACKERS_HOST, 0)
    _, number = port.sockets[0].getsockname()
    slots = asyncio.Semaphore(AT_ONCE)

    async def announce() -> None:
        config = NetworkConfig(swarm.addresses, host=ATTACKERS_HOST, serve_relay=False)
        async with slots:
            with contextlib.suppress(SwarmError):
                async with join(config) as node:
                    peer = node.transport.peer
                    addresses = (f"/ip4/{ATTACKERS_HOST}/tcp/{number}/p2p/{peer}",)
                    await node.directory.announce(swarm.model, boastful(swarm, peer, addresses), lifetime=MAX_LIFETIME)

    await asyncio.gather(*(announce() for _ in range(NUM_SILENT)))
    swarm.begun()
    await swarm.hold()


async def unwilling_servers(swarm: AttackedSwarm) -> None:
    """Servers that answer pings, with "working", and open no session."""

    async def pretend(stream: Stream) -> None:
        while True:
            if isinstance((await codec.receive(stream))[0], Ping):
                await codec.send(stream, Pong(working=True))

    for liar in await swarm.identities(NUM_UNWILLING):
        await liar.transport.listen(pretend)
        info = boastful(swarm, liar.transport.peer, liar.transport.addresses)
        await liar.directory.announce(swarm.model, info, lifetime=MAX_LIFETIME)
    swarm.begun()
    await swarm.hold()


ATTACKS = (
    Attack("silent-servers", silent_servers),
    Attack("unwilling-servers", unwilling_servers),
)
