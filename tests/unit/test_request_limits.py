"""What peers and networks may ask of this peer's part of the directory, and where they are connected from."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.net.addressing.origins import origin_of
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import DaemonFailed
from shoal.net.libp2p.hash_table import opened_records
from shoal.net.libp2p.hash_table.opened_records import OpenedRecords
from shoal.net.libp2p.hash_table.peer_origins import LIST_SECONDS, OLD_SECONDS, PeerOrigins
from shoal.net.libp2p.hash_table.request_limits import MOST_REMEMBERED, WINDOW_SECONDS, Rate, RequestLimits
from shoal.net.records import Announcement, seal
from shoal.net.tallies import seal_tally
from shoal.policy.network.table_room import UNKNOWN

from .test_directory_records import MODEL, info
from .test_tallies import ALICE, tally

HERE, THERE = (origin_of(f"/ip4/192.0.{number}.1/tcp/1") for number in range(2))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def asked(limits: RequestLimits, peer: str, origin: Any, *, times: int = 1000) -> int:
    """How often a peer may ask at once."""
    for number in range(times):
        if not limits.allows(peer, origin):
            return number
        limits.spent(1, peer, origin)
    return times


def test_a_peer_has_its_rate_and_a_network_its_own_however_many_identities_it_has() -> None:
    clock = Clock()
    limits = RequestLimits(Rate(of_peer=10, of_network=35), clock)
    assert [asked(limits, f"x{number}", HERE) for number in range(5)] == [10, 10, 10, 5, 0]
    assert asked(limits, "h", THERE) == 10
    clock.now += WINDOW_SECONDS / 2
    assert asked(limits, "h", THERE) == 5


def test_many_identities_take_no_memory_and_give_their_network_no_more() -> None:
    clock = Clock()
    limits = RequestLimits(Rate(of_peer=1, of_network=4), clock)
    for number in range(3 * MOST_REMEMBERED):
        limits.spent(1, f"x{number}", HERE)
    assert len(limits) <= MOST_REMEMBERED
    assert not asked(limits, "another", HERE)


class Listing:
    """A daemon that says what it is connected to, or fails."""

    def __init__(self, *connections: tuple[str, str | None]) -> None:
        self.connected = [*connections]
        self.times = 0
        self.is_gone = False

    async def connections(self) -> list[tuple[str, str | None]]:
        self.times += 1
        if self.is_gone:
            raise DaemonFailed("it is being restarted")
        return [*self.connected]


DIRECT, RELAYED = "/ip4/192.0.0.1/tcp/1", f"/ip4/198.51.100.1/tcp/1/p2p/{ALICE.peer}/p2p-circuit"


@pytest.mark.anyio
async def test_a_peer_is_where_it_is_connected_from_directly_if_it_is() -> None:
    daemon: Any = Listing(("a", RELAYED), ("b", DIRECT), ("b", RELAYED), ("c", None))
    origins = PeerOrigins(daemon, Clock())
    assert await origins.origin("a") == origin_of(RELAYED)
    assert await origins.origin("b") == HERE
    assert await origins.origin("c") == await origins.origin("nobody") == UNKNOWN
    assert daemon.times == 1
    await origins.close()


@pytest.mark.anyio
async def test_connections_are_listed_for_new_peers_but_not_as_often_as_strangers_come() -> None:
    daemon, clock = Listing(("a", DIRECT)), Clock()
    origins = PeerOrigins(daemon, clock)  # type: ignore[arg-type]
    assert await origins.origin("a") == HERE
    daemon.connected = [("b", DIRECT)]
    for number in range(50):
        assert await origins.origin(f"x{number}") == UNKNOWN
    assert daemon.times == 1
    clock.now += LIST_SECONDS + 0.01
    assert await origins.origin("b") == HERE
    assert await origins.origin("b") == HERE
    assert daemon.times == 2
    clock.now += OLD_SECONDS + 0.01
    daemon.is_gone = True
    assert await origins.origin("b") == HERE, "what is known counts while the daemon is being restarted"
    assert daemon.times == 3
    await origins.close()


def test_a_record_is_opened_once_and_those_that_are_remembered_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    unseal = opened_records.unseal
    monkeypatch.setattr(opened_records, "unseal", lambda record: opened.append(record) or unseal(record))
    sealed = []
    for identity in (Identity.temporary() for _ in range(8)):
        sealed.append(seal(identity, Announcement.of(MODEL, info(identity), expires=1e9)))
    size = opened_records.OPENED_BYTES + opened_records.OPENED_FACTOR * len(sealed[0])
    records = OpenedRecords(max_bytes=int(4.5 * size) * 4 // 3)
    for record in sealed[0], sealed[0], b"noise", b"noise":
        assert (records.announcement(record) is None) == (record == b"noise")
    assert opened == [sealed[0], b"noise", b"noise"], "what is not valid is not remembered"
    for record in sealed[1:]:
        assert records.announcement(record) is not None
    opened.clear()
    for record in [*sealed[-4:], sealed[0]]:
        assert records.announcement(record) is not None
    assert opened == [sealed[0]], "the latest are remembered"
    assert records.tally(sealed[0]) is None
    assert records.tally(seal_tally(ALICE, tally())) is not None
