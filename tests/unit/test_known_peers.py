"""Finding back into the table, without a network: a table that is a dict, and peers that answer or do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht.node import Blacklist
from hivemind.p2p import PeerID

from shoal.net.identity import Identity
from shoal.net.libp2p.known_peers import MAX_KNOWN, KnownPeers

pytestmark = pytest.mark.anyio


class Table:
    """What hivemind's node has that is used here; `awake` are those who answer."""

    def __init__(self, *present: str) -> None:
        self.awake: set[PeerID] = set()
        self.called: list[str] = []
        self.answered = asyncio.Event()
        self.on_call: Callable[[], None] = lambda: None
        self.blacklist = Blacklist(base_time=30, backoff_rate=2)
        self.routing_table = SimpleNamespace(peer_id_to_uid={PeerID.from_base58(peer): 1 for peer in present})
        self.protocol = self

    def lose(self, peer: str) -> None:
        peer_id = PeerID.from_base58(peer)
        del self.routing_table.peer_id_to_uid[peer_id]
        self.blacklist.register_failure(peer_id)

    async def call_ping(self, peer: PeerID) -> int | None:
        self.called.append(peer.to_base58())
        self.on_call()
        if peer not in self.awake:
            return None
        self.routing_table.peer_id_to_uid[peer] = 1
        self.answered.set()
        return 1


def peers(count: int) -> list[str]:
    return [Identity.temporary().peer for _ in range(count)]


async def test_whoever_is_missing_is_called_until_it_answers_while_others_are_left_alone() -> None:
    stays, vanishes = peers(2)
    table = Table(stays, vanishes)
    others = known_peers(table, check_seconds=0.0)
    try:
        table.lose(vanishes)
        assert not others.lost
        table.awake.add(PeerID.from_base58(vanishes))
        async with asyncio.timeout(5):
            await table.answered.wait()
        assert set(table.called) == {vanishes}
        assert PeerID.from_base58(vanishes) not in table.blacklist
    finally:
        await others.close()


async def test_a_peer_that_is_banned_though_it_is_back_is_as_good_as_missing() -> None:
    (only,) = peers(1)
    table = Table(only)
    others = known_peers(table)
    try:
        table.blacklist.register_failure(PeerID.from_base58(only))
        assert others.lost
        table.awake.add(PeerID.from_base58(only))
        await others.rejoin()
        assert not others.lost
    finally:
        await others.close()


async def test_who_calls_the_others_is_lost_until_one_of_them_answers() -> None:
    one, other = peers(2)
    table = Table(one, other)
    others = known_peers(table)
    lost = []
    table.on_call = lambda: lost.append(others.lost)
    try:
        for peer in (one, other):
            table.blacklist.register_failure(PeerID.from_base58(peer))
        await others.rejoin()
        assert others.lost
        assert lost == [True] * 4
        table.awake.add(PeerID.from_base58(other))
        await others.rejoin()
        assert not others.lost
        assert PeerID.from_base58(one) not in table.blacklist  # it may be asked again
    finally:
        await others.close()


async def test_who_never_met_anybody_is_not_lost() -> None:
    others = known_peers(Table())
    try:
        assert not others.lost
    finally:
        await others.close()


async def test_the_latest_are_remembered_and_no_more() -> None:
    table = Table(*peers(MAX_KNOWN + 10))
    others = known_peers(table)
    try:
        assert not others.lost
        table.routing_table.peer_id_to_uid.clear()
        await others.rejoin()
        assert len(set(table.called)) == MAX_KNOWN
    finally:
        await others.close()


async def test_all_who_wait_for_the_way_back_wait_for_one_attempt() -> None:
    (only,) = peers(1)
    table = Table(only)
    others = known_peers(table)
    try:
        table.lose(only)
        table.awake.add(PeerID.from_base58(only))
        await asyncio.gather(*(others.rejoin() for _ in range(10)))
        assert table.called == [only]
    finally:
        await others.close()


class DeadDaemon:
    async def connect(self, peer: str, addresses: object) -> None:
        raise TimeoutError


def known_peers(table: Table, *, check_seconds: float = 60.0) -> KnownPeers:
    own = Identity.temporary().peer
    others = KnownPeers(own, initial_peers=(), keeps_records=True, check_seconds=check_seconds)
    daemon: Any = DeadDaemon()
    others.attach(daemon, table)
    return others
