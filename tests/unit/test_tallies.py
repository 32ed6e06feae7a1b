"""Every forged or impossible report on a shard is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hivemind.dht import crypto, routing
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.records import MAX_RECORD_BYTES, seal, shard_key, tallies_key
from shoal.net.tallies import MAX_TALLIED, ShardTally, seal_tally, unseal_tally
from shoal.policy.census.histogram import MAX_CELLS, Cell
from shoal.policy.census.levels import shard_of
from shoal.spans import Span

from .test_directory_records import ALICE, FRONT, MALLORY, MODEL, NOW, announcement, pack

SHARD = shard_of(ALICE.peer, 0, 2)
CELLS = (
    Cell(Span(0, 4), 12, 10, 20, 23800.0, 31250.0, 911.5, 1.5),
    Cell(Span(3, 16), 2, 0, 16, 11400.0, 20000.0, 0.0, 2.0),
)
validator = RecordValidator(lambda: NOW)


def tally(**changes: Any) -> ShardTally:
    made = ShardTally.of(ALICE.peer, MODEL, SHARD, CELLS, expires=NOW + 60)
    return made.model_copy(update=changes)


def body(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = tally().model_dump(mode="json")
    return fields | changes


def signed(fields: dict[str, Any], identity: Identity = ALICE, domain: bytes = b"shoal tally 1\0") -> bytes:
    raw = json.dumps(fields).encode()
    return identity.sign(domain + raw) + raw


def is_stored(value: bytes, *, key: str = tallies_key(MODEL.key, 0), peer: str = ALICE.peer) -> bool:
    digest = routing.DHTID.generate(key).to_bytes()
    stored: bool = validator.validate(crypto.DHTRecord(digest, pack(peer), pack(value), NOW + 60))
    return stored


def test_a_tally_is_read_as_it_was_made():
    opened = unseal_tally(seal_tally(ALICE, tally()))
    assert opened is not None
    assert (opened.tally, opened.shard, opened.peer) == (CELLS, SHARD, ALICE.peer)


def test_a_tally_is_stored_with_those_of_its_bucket_only():
    record = seal_tally(ALICE, tally())
    assert is_stored(record)
    assert not is_stored(record, key=tallies_key(MODEL.key, 1))
    assert not is_stored(record, key=tallies_key("another", 0))
    assert not is_stored(record, key=shard_key(MODEL.key, FRONT))
    assert not is_stored(record, peer=MALLORY.peer)


def test_an_announcement_is_no_tally_and_a_tally_is_no_announcement():
    assert not is_stored(seal(ALICE, announcement()))
    assert unseal_tally(signed(body(), domain=b"shoal announcement 2\0")) is None


def test_a_peer_reports_on_its_own_shard():
    with pytest.raises(ValueError, match="its own shard"):
        seal_tally(MALLORY, tally())
    assert unseal_tally(signed(body(), MALLORY)) is None
    forged = unseal_tally(signed(body(peer=MALLORY.peer), MALLORY))
    assert forged is not None
    assert forged.shard == shard_of(MALLORY.peer, 0, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("level", 9),
        ("level", -1),
        ("bucket", 1),
        ("num_blocks", 15),
        ("expires", "soon"),
        ("rows", [[0, 4, 12, 10, 20, 1.0, 1.0, 1.0, 1.0]] * 2),
        ("rows", [[0, 4, 12, 13, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 4, 0, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 4, MAX_TALLIED + 1, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, length, MAX_TALLIED // 2, 0, 20, 1.0, 1.0, 1.0, 1.0] for length in (1, 2, 3)]),
        ("rows", [[0, 4, 1, 0, 20, -1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 4, 1, 0, 20, 1e12, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 4, 1, 0, 20, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 4, 1.5, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[8, 4, 1, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 0, 1, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[0, 17, 1, 0, 20, 1.0, 1.0, 1.0, 1.0]]),
        ("rows", [[start, 1, 1, 0, 20, 1.0, 1.0, 1.0, 1.0] for start in range(8)] * (MAX_CELLS // 8 + 1)),
        ("rows", "many"),
    ],
)
def test_an_impossible_tally_is_refused_even_with_a_valid_signature(field: str, value: object):
    assert unseal_tally(signed(body())) is not None
    assert unseal_tally(signed(body(**{field: value}))) is None


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_tally_with_a_changed_byte_is_refused(position: int, flip: int):
    record = bytearray(seal_tally(ALICE, tally()))
    record[position % len(record)] ^= flip
    assert unseal_tally(bytes(record)) is None


def test_a_tally_with_the_most_spans_fits_into_a_record_with_all_servers():
    model = MODEL.__class__("m" * 256, MODEL.name, MODEL.family, 4096)
    cells = tuple(
        Cell(Span(index % 8, 4000 - index), 1 + index % 5, 1, 4096, 1.2345e-5, 1.2345e-5, 1.2345e-5, 1.2345e-5)
        for index in range(MAX_CELLS)
    )
    record = seal_tally(ALICE, ShardTally.of(ALICE.peer, model, SHARD, cells, expires=NOW + 60.123456))
    assert len(record) <= MAX_RECORD_BYTES
    opened = unseal_tally(record)
    assert opened is not None
    assert 20 <= len(opened.tally) < MAX_CELLS
    assert sum(cell.count for cell in opened.tally) == sum(cell.count for cell in cells)
