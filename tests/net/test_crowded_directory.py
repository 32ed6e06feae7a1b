"""The real hash table with the records of many servers: shards, levels and tallies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer

from shoal.net import NetworkConfig, join
from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.record_table import RecordTable
from shoal.net.records import Announcement, seal, shard_key
from shoal.net.tallies import ShardTally, seal_tally
from shoal.net.transport import Node
from shoal.peers import ServerInfo
from shoal.policy.census.histogram import tally_of
from shoal.policy.census.levels import Shard, reporters, shard_of, shards_at
from shoal.policy.network.table_room import Held, Origin
from tests import server_infos

from .test_libp2p import CLIENT, MODEL, SERVER, foreign_daemon, info, swarm

pytestmark = pytest.mark.anyio

pack = MSGPackSerializer.dumps


def crowd(number: int, **said: Any) -> dict[Identity, ServerInfo]:
    """Servers that are nothing but records."""
    identities = [Identity.temporary() for _ in range(number)]
    return {identity: server_infos.info(identity.peer, **said) for identity in identities}


def store(nodes: Sequence[Node], records: Sequence[tuple[Sequence[str], str, bytes]], expires: float) -> bool:
    """Put records into the tables of these nodes, each under its keys, as if their peers had stored them there.

    Returns whether there was room for all.
    """
    origin = Origin("192.0.2.0/24", "192.0.0.0/16")
    stored = []
    for node in nodes:
        for keys, peer, record in records:
            for key in keys:
                stored.append(table_of(node).take(DHTID.generate(key), peer, pack(record), expires, origin=origin))
    return all(stored)


def table_of(node: Node) -> RecordTable:
    """The part of the hash table that a node stores for others. Its users read what all nodes say together."""
    directory: Any = node.directory
    table: RecordTable = directory._table
    return table


def held_by(node: Node, owner: str) -> list[Held]:
    """What this node has stored of a peer."""
    return [held for held in table_of(node).records() if held.owner == owner]


def publish(nodes: Sequence[Node], servers: dict[Identity, ServerInfo], *, level: int) -> bool:
    expires = time.time() + 200
    records = []
    for identity, each in servers.items():
        announcement = Announcement.of(MODEL, each, expires=expires, level=level)
        records.append((announcement.dht_keys, identity.peer, seal(identity, announcement)))
    return store(nodes, records, expires)


async def test_servers_are_found_at_all_levels_while_their_bucket_becomes_crowded() -> None:
    few, more, many = crowd(50), crowd(60), crowd(150)
    async with swarm(SERVER, SERVER, CLIENT, CLIENT) as (*servers, before, after):
        assert publish(servers, few, level=0)
        assert {each.peer for each in await before.directory.servers(MODEL)} == {each.peer for each in few}
        assert publish(servers, more, level=1)
        seen = {each.peer for each in await before.directory.servers(MODEL)}
        assert seen == {each.peer for each in (*few, *more)}
        # The first servers have followed: what they published before is replaced.
        assert publish(servers, few, level=1)
        assert publish(servers, many, level=2)
        everybody = {each.peer for each in (*few, *more, *many)}
        for node in before, after:
            assert {each.peer for each in await node.directory.servers(MODEL)} == everybody


async def test_a_server_that_joins_a_crowded_bucket_publishes_where_the_others_do() -> None:
    others = crowd(150)
    async with swarm(SERVER, CLIENT) as (first, server, client):
        assert publish((first, server), others, level=2)
        await server.directory.servers(MODEL)
        await server.directory.announce(MODEL, info(server, 0, 4), lifetime=60)
        seen = {each.peer for each in await client.directory.servers(MODEL)}
        assert seen == {server.transport.peer, *(each.peer for each in others)}
        assert await client.directory.models() == (MODEL,)


async def test_a_histogram_is_read_from_the_tallies_of_a_crowded_bucket() -> None:
    others, level, expires = crowd(1000), 5, time.time() + 200
    async with swarm(SERVER, SERVER) as nodes:
        assert publish(nodes, others, level=level)
        records = []
        for shard in shards_at(0, level - 1):
            members = {one: each for one, each in others.items() if shard_of(one.peer, 0, level - 1) == shard}
            tally = tally_of(members.values(), now=time.time())
            turn = reporters([one.peer for one in members], now=time.time())
            for identity in members:
                if identity.peer in turn:
                    report = ShardTally.of(identity.peer, MODEL, shard, tally, expires=expires)
                    records.append((report.dht_keys, identity.peer, seal_tally(identity, report)))
        assert store(nodes, records, expires)
        _, server, _ = nodes
        found = await server.directory.histogram(MODEL)
        assert not found.exact
        assert found.holders(8) == [1000] * 4 + [0] * 4
        sample = await server.directory.servers(MODEL)
        assert 40 <= len(sample) < 1000


async def attack(victims: Sequence[Node], records: Sequence[tuple[str, str, bytes]], expires: float) -> list[bool]:
    """One node of hivemind's own, without limits, stores these records at all victims, each under its key."""
    async with foreign_daemon(victims[0]) as (daemon, _):
        for victim in victims[1:]:
            await daemon.connect(victim.transport.peer, victim.transport.addresses)
        p2p = await P2P.replicate(daemon.control)
        table = await DHTNode.create(p2p=p2p, initial_peers=[f"/p2p/{each.transport.peer}" for each in victims])
        stored: list[bool] = []
        for victim in victims:
            peer = PeerID.from_base58(victim.transport.peer)
            for first in range(0, len(records), 200):
                keys, subkeys, values = zip(*records[first : first + 200], strict=True)
                stored += await table.protocol.call_store(
                    peer, [DHTID.generate(key) for key in keys], [pack(value) for value in values], expires, subkeys
                )
        await table.shutdown()
        await p2p.shutdown()
    return stored


async def test_records_that_one_node_stores_for_identities_that_it_made_are_read_by_nobody() -> None:
    expires, key = time.time() + 200, shard_key(MODEL.key, Shard(0, 0, 0))
    invented = [
        (key, identity.peer, seal(identity, Announcement.of(MODEL, each, expires=expires)))
        for identity, each in crowd(1200).items()
    ]
    async with swarm(SERVER, CLIENT, CLIENT) as (first, server, before, after):
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=60)
        assert await before.directory.servers(MODEL) == (info(server, 0, 8),)
        assert not any(await attack((first, server), invented, expires))
        for reader in before, after, first:
            assert await reader.directory.servers(MODEL) == (info(server, 0, 8),)


async def test_the_holder_of_a_block_is_found_beside_a_network_that_fills_the_blocks_key() -> None:
    """The crowd has identities that are there, as many as it likes: each record came from its own peer."""
    others = crowd(1200, addresses=("a" * 300,) * 8)
    async with swarm(SERVER, CLIENT, CLIENT) as (first, server, before, after):
        assert not publish((first, server), others, level=0)
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=60)
        publish((first, server), others, level=0)
        assert held_by(first, server.transport.peer), "it came last, and found room"
        for reader in before, after, before, after:
            assert info(server, 0, 8) in await reader.directory.servers(MODEL)


async def test_a_server_knows_the_network_from_which_a_record_came() -> None:
    async with swarm() as (first,):
        config = NetworkConfig(initial_peers=first.transport.addresses, host="127.0.3.1")
        async with join(config) as guest:
            await guest.directory.announce(MODEL, info(guest, 0, 4), lifetime=60)
            origins = {record.origin for record in held_by(first, guest.transport.peer)}
            assert origins == {Origin("127.0.3.1", "127.0.0.0/16")}


class Hiding(RecordTable):
    """The table of a node that says that it stores what it is sent, and shows nothing."""

    def take(self, *_: Any, **__: Any) -> bool:
        return True

    def part(self, *_: Any, **__: Any) -> None:
        return None


async def test_a_server_is_found_although_the_nodes_nearest_to_its_key_hide_what_they_store() -> None:
    key = DHTID.generate(shard_key(MODEL.key, Shard(0, 0, 0)))
    async with swarm(SERVER, CLIENT) as (first, server, client), AsyncExitStack() as stack:
        address = f"/p2p/{first.transport.peer}"
        for number in range(1, 6):  # as many as store a record
            daemon, _ = await stack.enter_async_context(foreign_daemon(first))
            p2p = await P2P.replicate(daemon.control)
            node = await DHTNode.create(p2p=p2p, node_id=DHTID(key ^ number), initial_peers=[address])
            node.protocol.use(Hiding(), None)
            stack.push_async_callback(p2p.shutdown)
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=60)
        assert not [held for held in held_by(first, server.transport.peer) if held.key == key]
        assert await client.directory.servers(MODEL) == (info(server, 0, 8),)
