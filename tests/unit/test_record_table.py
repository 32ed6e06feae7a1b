"""The table in which a peer stores records for others."""

from __future__ import annotations

import pytest
from hivemind.dht.routing import DHTID

from shoal.net.addressing.origins import origin_of
from shoal.net.libp2p.hash_table.record_table import RecordTable, TableLimits
from shoal.policy.network.table_room import RECORD_OVERHEAD_BYTES, Origin

KEYS = [DHTID.generate(f"key {number}") for number in range(40)]
SIZE = 500 + RECORD_OVERHEAD_BYTES
NOW = 4e9
"""Later than the time of the machine, which hivemind's dictionaries look at."""
MALLORY = origin_of("/ip4/192.0.2.1/tcp/1")
"""Where one node with very many identities is."""


class Table(RecordTable):
    """A table with a clock of its own, and records of 500 bytes."""

    def __init__(self, limits: TableLimits | None = None) -> None:
        self.now = NOW
        super().__init__(limits, clock=lambda: self.now)

    def put(self, owner: str, *, key: DHTID = KEYS[0], origin: Origin | None = MALLORY, lifetime: float = 60.0) -> bool:
        return self.take(key, owner, owner.encode().ljust(500), self.now + lifetime, origin=origin)

    def found(self, key: DHTID = KEYS[0]) -> set[str]:
        item = self.get(key)
        return set() if item is None else set(item.value.data)


def test_a_record_is_stored_until_it_expires_and_replaced_by_a_later_one() -> None:
    table = Table()
    assert table.put("a", lifetime=60.0)
    assert not table.put("a", lifetime=60.0)
    assert not table.put("a", lifetime=30.0)
    assert table.put("a", lifetime=90.0)
    item = table.get(KEYS[0])
    assert item is not None
    assert item.expiration_time == NOW + 90
    assert item.value.data["a"] == (b"a".ljust(500), NOW + 90)
    table.now = NOW + 90
    assert table.get(KEYS[0]) is None
    assert not table.put("a", lifetime=0.0)


def test_records_that_have_expired_take_no_memory() -> None:
    table = Table()
    for number in range(100):
        table.put(f"{number}")
    assert (len(table), table.num_bytes) == (100, 100 * SIZE)
    table.now += 61.0
    assert table.put("another")
    assert (len(table), table.num_bytes) == (1, SIZE)


def test_a_record_that_is_stored_again_and_again_takes_no_more_memory() -> None:
    table = Table()
    for number in range(1000):
        assert table.put("a", lifetime=60.0 + number / 1000)
    assert (len(table), table.num_bytes) == (1, SIZE)


def test_what_a_reader_does_with_an_answer_does_not_change_the_table() -> None:
    table = Table()
    table.put("a")
    item = table.get(KEYS[0])
    assert item is not None
    item.value.store("mallory", b"merged from another answer", NOW + 60)  # as hivemind does
    assert table.found() == {"a"}


def test_one_network_that_fills_a_key_pushes_out_no_other_and_keeps_none_out() -> None:
    table = Table(TableLimits(key_bytes=100 * SIZE))
    early, late = (origin_of(f"/ip4/198.51.{number}.1/tcp/1") for number in range(2))
    assert table.put("early", origin=early)
    for number in range(1200):
        table.put(f"x{number}")
    assert table.put("late", origin=late)
    assert table.put("own", origin=None)
    for number in range(1200):
        table.put(f"y{number}")
    assert {"early", "late", "own"} <= table.found()
    assert 80 <= len(table.found()) <= 100


def test_in_one_network_those_that_were_there_before_stay() -> None:
    table = Table(TableLimits(key_bytes=100 * SIZE))
    for number in range(30):
        assert table.put(f"neighbor {number}")
    for step in range(20):
        table.now += 10.0
        for number in range(30):
            assert table.put(f"neighbor {number}")
        for number in range(100):
            table.put(f"x{step}-{number}", lifetime=300.0)
    assert {f"neighbor {number}" for number in range(30)} <= table.found()


@pytest.mark.parametrize("num_networks", [1, 50])
def test_the_table_stays_within_its_budget_and_others_keep_their_records(num_networks: int) -> None:
    table = Table(TableLimits(table_bytes=1000 * SIZE))
    honest = [origin_of(f"/ip4/198.51.{number}.1/tcp/1") for number in range(10)]
    for number, origin in enumerate(honest):
        assert all(table.put(f"h{number}", key=key, origin=origin) for key in KEYS[:3])
    for number in range(400):
        for key in KEYS[:10]:
            table.put(f"x{number}", key=key, origin=origin_of(f"/ip4/192.0.{number % num_networks}.1/tcp/1"))
            assert table.num_bytes <= 1000 * SIZE
    assert len(table) > 900
    for key in KEYS[:3]:
        assert {f"h{number}" for number in range(10)} <= table.found(key)


def test_one_peer_has_records_under_a_few_keys_only_the_latest() -> None:
    table = Table(TableLimits(owner_records=5))
    assert table.put("another", key=KEYS[0])
    for number, key in enumerate(KEYS):
        assert table.put("a", key=key, lifetime=60.0 + number)
    assert [key for key in KEYS if "a" in table.found(key)] == KEYS[-5:]
    assert table.found(KEYS[0]) == {"another"}


def test_a_value_that_belongs_to_no_peer_is_not_stored() -> None:
    table = Table()
    assert not table.store(KEYS[0], b"mine alone", table.now + 60.0)
    assert table.store(KEYS[0], b"mine", table.now + 60.0, subkey="me")
    assert table.found() == {"me"}
