"""Rejoining the DHT, without a network: a routing table that is a dict, and peers that answer or do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.node import Blacklist
from hivemind.p2p import PeerID

from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.known_peers import MAX_KNOWN, KnownPeers

pytestmark = pytest.mark.anyio


class Table:
    """The parts of hivemind's node that `KnownPeers` uses. The peers in `awake` answer."""

    def __init__(self, *present: str) -> None:
        self.awake: set[PeerID] = set()
        self.pinged: list[str] = []
        self.answered = asyncio.Event()
        self.on_ping: Callable[[], None] = lambda: None
        self.blacklist = Blacklist(base_time=30, backoff_rate=2)
        self.routing_table = SimpleNamespace(peer_id_to_uid={PeerID.from_base58(peer): 1 for peer in present})
        self.protocol = self

    def lose(self, peer: str) -> None:
        peer_id = PeerID.from_base58(peer)
        del self.routing_table.peer_id_to_uid[peer_id]
        self.blacklist.register_failure(peer_id)

    async def call_ping(self, peer: PeerID) -> int | None:
        self.pinged.append(peer.to_base58())
        self.on_ping()
        if peer not in self.awake:
            return None
        self.routing_table.peer_id_to_uid[peer] = 1
        self.answered.set()
        return 1


def peers(count: int) -> list[str]:
    return [Identity.temporary().peer for _ in range(count)]


async def test_a_missing_peer_is_pinged_until_it_answers_and_the_others_are_not() -> None:
    stays, vanishes = peers(2)
    table = Table(stays, vanishes)
    known = known_peers(table, check_seconds=0.0)
    try:
        table.lose(vanishes)
        assert not known.is_isolated
        table.awake.add(PeerID.from_base58(vanishes))
        async with asyncio.timeout(5):
            await table.answered.wait()
        assert set(table.pinged) == {vanishes}
        assert PeerID.from_base58(vanishes) not in table.blacklist
    finally:
        await known.close()


async def test_a_banned_peer_counts_as_missing_even_if_it_is_back() -> None:
    (only,) = peers(1)
    table = Table(only)
    known = known_peers(table)
    try:
        table.blacklist.register_failure(PeerID.from_base58(only))
        assert known.is_isolated
        table.awake.add(PeerID.from_base58(only))
        await known.rejoin()
        assert not known.is_isolated
    finally:
        await known.close()


async def test_a_peer_is_isolated_until_one_of_the_others_answers() -> None:
    one, other = peers(2)
    table = Table(one, other)
    known = known_peers(table)
    isolated = []
    table.on_ping = lambda: isolated.append(known.is_isolated)
    try:
        for peer in (one, other):
            table.blacklist.register_failure(PeerID.from_base58(peer))
        await known.rejoin()
        assert known.is_isolated
        assert isolated == [True] * 4
        table.awake.add(PeerID.from_base58(other))
        await known.rejoin()
        assert not known.is_isolated
        assert PeerID.from_base58(one) not in table.blacklist  # its ban is lifted too
    finally:
        await known.close()


async def test_a_peer_that_never_had_others_is_not_isolated() -> None:
    known = known_peers(Table())
    try:
        assert not known.is_isolated
    finally:
        await known.close()


async def test_only_the_latest_peers_are_remembered() -> None:
    table = Table(*peers(MAX_KNOWN + 10))
    known = known_peers(table)
    try:
        assert not known.is_isolated
        table.routing_table.peer_id_to_uid.clear()
        await known.rejoin()
        assert len(set(table.pinged)) == MAX_KNOWN
    finally:
        await known.close()


async def test_concurrent_calls_share_one_attempt_to_rejoin() -> None:
    (only,) = peers(1)
    table = Table(only)
    known = known_peers(table)
    try:
        table.lose(only)
        table.awake.add(PeerID.from_base58(only))
        await asyncio.gather(*(known.rejoin() for _ in range(10)))
        assert table.pinged == [only]
    finally:
        await known.close()


class DeadDaemon:
    async def connect(self, peer: str, addresses: object) -> None:
        raise TimeoutError


def known_peers(table: Table, *, check_seconds: float = 60.0) -> KnownPeers:
    own = Identity.temporary().peer
    known = KnownPeers(own, initial_peers=(), stores_records=True, check_seconds=check_seconds)
    daemon: Any = DeadDaemon()
    known.attach(daemon, table)
    return known
