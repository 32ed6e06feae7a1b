"""Attacks on the directory: on the memory of those that store it, and on what readers find in it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from benchmarks.abuse.attacked_swarm import ATTACKERS_HOST, AttackedSwarm
from benchmarks.abuse.attacks import Attack
from shoal.net import NetworkConfig, join
from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.opened_records import MAX_OPENED_BYTES
from shoal.net.libp2p.hash_table.record_table import MAX_TABLE_BYTES
from shoal.net.records import Announcement, seal, shard_key
from shoal.net.transport import Node
from shoal.peers import ServerInfo
from shoal.policy.census.levels import Shard

BUDGET_BYTES = MAX_TABLE_BYTES + MAX_OPENED_BYTES
LIFETIME = 290.0
NUM_INVENTED = 1200
STORED_AT_ONCE = 200
NUM_LOOKUPS_AT_ONCE = 8
NUM_LIARS = 40
LIARS_AT_ONCE = 4
"""Each has a daemon of its own for a moment."""


def _hash_table(node: Node) -> Any:
    """hivemind's protocol as an attacker uses it, beside the directory."""
    directory: Any = node.directory
    return directory._node.protocol


def _record(identity: Identity, swarm: AttackedSwarm, info: ServerInfo) -> tuple[float, bytes]:
    """When a record expires, and the record: an announcement of this peer that is otherwise as `info` says."""
    expires = time.time() + LIFETIME
    announced = replace(info, peer=identity.peer)
    return expires, seal(identity, Announcement.of(swarm.model, announced, expires=expires))


async def repeated_key(swarm: AttackedSwarm) -> None:
    """Look-ups of one key, repeated a hundred times in each, as fast as the servers answer."""
    (attacker,) = await swarm.identities(1)
    key = DHTID.generate(shard_key(swarm.model.key, Shard(0, 0, 0))).to_bytes()
    protocol = _hash_table(attacker)

    async def ask(server: ServerInfo) -> None:
        while True:
            with contextlib.suppress(Exception):  # refused, or not answered in time
                request = dht_pb2.FindRequest(keys=[key] * 100)
                await protocol.get_stub(PeerID.from_base58(server.peer)).rpc_find(request, timeout=5)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for server in swarm.servers * NUM_LOOKUPS_AT_ONCE:
            tasks.create_task(ask(server))
        swarm.begun()


async def filled_key(swarm: AttackedSwarm) -> None:
    """One node stores records of 1,200 identities that it has made, of the largest size, under the blocks' key."""
    (attacker,) = await swarm.identities(1)
    identities = [Identity.temporary() for _ in range(NUM_INVENTED)]
    padded = replace(swarm.servers[0], decode_speed=1e9, prefill_speed=1e9, addresses=("a" * 300,) * 8)
    key = DHTID.generate(shard_key(swarm.model.key, Shard(0, 0, 0)))
    while True:
        records = [(identity.peer, *_record(identity, swarm, padded)) for identity in identities]
        for server in swarm.servers:
            for first in range(0, len(records), STORED_AT_ONCE):
                await _store(attacker, server, key, records[first : first + STORED_AT_ONCE])
        swarm.begun()


async def _store(attacker: Node, server: ServerInfo, key: DHTID, records: Sequence[tuple[str, float, bytes]]) -> None:
    peers, expires, sealed = zip(*records, strict=True)
    packed = [MSGPackSerializer.dumps(each) for each in sealed]
    await _hash_table(attacker).call_store(
        PeerID.from_base58(server.peer), [key] * len(packed), packed, expires, list(peers)
    )


async def silent_and_fast(swarm: AttackedSwarm) -> None:
    """40 identities announce a speed of 1e9, at a port that accepts and says nothing. Each stores its own record."""
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: held.append(writer), ATTACKERS_HOST, 0)
    port = silent.sockets[0].getsockname()[1]
    places = asyncio.Semaphore(LIARS_AT_ONCE)

    async def announce(server: ServerInfo) -> None:
        async with places, join(NetworkConfig(swarm.addresses, client_mode=True)) as liar:
            address = f"/ip4/{ATTACKERS_HOST}/tcp/{port}/p2p/{liar.transport.peer}"
            claimed = replace(
                server, peer=liar.transport.peer, decode_speed=1e9, prefill_speed=1e9, addresses=(address,)
            )
            await liar.directory.announce(swarm.model, claimed, lifetime=LIFETIME)

    await asyncio.gather(*(announce(swarm.servers[number % len(swarm.servers)]) for number in range(NUM_LIARS)))
    swarm.begun()
    await swarm.hold()


ATTACKS = (
    Attack("repeated-key", repeated_key, budget_bytes=BUDGET_BYTES),
    Attack("filled-key", filled_key, budget_bytes=BUDGET_BYTES),
    Attack("silent-and-fast", silent_and_fast),
)
