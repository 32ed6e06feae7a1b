"""The real hash table with the records of many servers: shards, levels and tallies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hivemind.dht.routing import DHTID
from hivemind.utils import MSGPackSerializer

from shoal.net.identity import Identity
from shoal.net.records import Announcement, seal
from shoal.net.tallies import ShardTally, seal_tally
from shoal.net.transport import Node
from shoal.peers import ServerInfo
from shoal.policy.census.histogram import tally_of
from shoal.policy.census.levels import reporters, shard_of, shards_at
from shoal.policy.network.table_room import Origin
from tests import server_infos

from .test_libp2p import CLIENT, MODEL, SERVER, info, swarm

pytestmark = pytest.mark.anyio

pack = MSGPackSerializer.dumps


def crowd(number: int) -> dict[Identity, ServerInfo]:
    """Servers that are nothing but records."""
    identities = [Identity.temporary() for _ in range(number)]
    return {identity: server_infos.info(identity.peer) for identity in identities}


def store(nodes: Sequence[Node], records: Sequence[tuple[Sequence[str], str, bytes]], expires: float) -> None:
    """Put records into the tables of these nodes, each under its keys, as if their peers had stored them there."""
    origin = Origin("192.0.2.0/24", "192.0.0.0/16")
    for keys, peer, record in records:
        for key in keys:
            for node in nodes:
                directory: Any = node.directory
                stored = pack(record)
                assert directory._table.take(DHTID.generate(key), peer, stored, expires, origin=origin)


def publish(nodes: Sequence[Node], servers: dict[Identity, ServerInfo], *, level: int) -> None:
    expires = time.time() + 200
    records = []
    for identity, each in servers.items():
        announcement = Announcement.of(MODEL, each, expires=expires, level=level)
        records.append((announcement.dht_keys, identity.peer, seal(identity, announcement)))
    store(nodes, records, expires)


async def test_servers_are_found_at_all_levels_while_their_bucket_becomes_crowded() -> None:
    few, more, many = crowd(50), crowd(60), crowd(150)
    async with swarm(SERVER, SERVER, CLIENT, CLIENT) as (*servers, before, after):
        publish(servers, few, level=0)
        assert {each.peer for each in await before.directory.servers(MODEL)} == {each.peer for each in few}
        publish(servers, more, level=1)
        seen = {each.peer for each in await before.directory.servers(MODEL)}
        assert seen == {each.peer for each in (*few, *more)}
        # The first servers have followed: what they published before is replaced.
        publish(servers, few, level=1)
        publish(servers, many, level=2)
        everybody = {each.peer for each in (*few, *more, *many)}
        for node in before, after:
            assert {each.peer for each in await node.directory.servers(MODEL)} == everybody


async def test_a_server_that_joins_a_crowded_bucket_publishes_where_the_others_do() -> None:
    others = crowd(150)
    async with swarm(SERVER, CLIENT) as (first, server, client):
        publish((first, server), others, level=2)
        await server.directory.servers(MODEL)
        await server.directory.announce(MODEL, info(server, 0, 4), lifetime=60)
        seen = {each.peer for each in await client.directory.servers(MODEL)}
        assert seen == {server.transport.peer, *(each.peer for each in others)}
        assert await client.directory.models() == (MODEL,)


async def test_a_histogram_is_read_from_the_tallies_of_a_crowded_bucket() -> None:
    others, level, expires = crowd(1000), 5, time.time() + 200
    async with swarm(SERVER, SERVER) as nodes:
        publish(nodes, others, level=level)
        records = []
        for shard in shards_at(0, level - 1):
            members = {one: each for one, each in others.items() if shard_of(one.peer, 0, level - 1) == shard}
            tally = tally_of(members.values(), now=time.time())
            turn = reporters([one.peer for one in members], now=time.time())
            for identity in members:
                if identity.peer in turn:
                    report = ShardTally.of(identity.peer, MODEL, shard, tally, expires=expires)
                    records.append((report.dht_keys, identity.peer, seal_tally(identity, report)))
        store(nodes, records, expires)
        _, server, _ = nodes
        found = await server.directory.histogram(MODEL)
        assert not found.exact
        assert found.holders(8) == [1000] * 4 + [0] * 4
        sample = await server.directory.servers(MODEL)
        assert 40 <= len(sample) < 1000
