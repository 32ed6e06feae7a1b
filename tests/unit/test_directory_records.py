"""Every forged record is refused, by the peer that would store it and by the peer that reads it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hivemind import utils as hivemind_utils
from hivemind.dht import crypto, routing
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.records import (
    CLOCK_SKEW,
    MAX_RECORD_BYTES,
    Announcement,
    is_timely,
    registry_key,
    registry_shard,
    seal,
    shard_key,
    unseal,
)
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import MAX_SPANS_ON_DISK, MAX_SPEED_POINTS, Capacity, ModelInfo, ServerInfo, ServerState
from shoal.policy.census.levels import Shard, is_sampled, shards_at, shards_of
from shoal.spans import Span

NOW = 1_800_000_000.0
ALICE, MALLORY = Identity.temporary(), Identity.temporary()
MODEL = ModelInfo(key="m" * 32, name="org/model", family="llama", num_blocks=16)
FRONT = Shard(0, 0, 0)
pack = hivemind_utils.MSGPackSerializer.dumps
validator = RecordValidator(lambda: NOW)


def info(identity: Identity = ALICE, **changes: Any) -> ServerInfo:
    fields: dict[str, Any] = {
        "peer": identity.peer,
        "span": Span(2, 5),
        "state": ServerState.ONLINE,
        "fingerprint": "f" * 32,
        "decode_speed": 12.5,
        "prefill_speed": 300.0,
        "cache_tokens_left": 4096,
        "dtype": "bfloat16",
        "quantization": "none",
        "version": "0.1.0",
        "name": "Alice's machine",
        "addresses": (f"/ip4/10.0.0.1/tcp/31337/p2p/{identity.peer}",),
        "encodings": ("bfloat16", "int8"),
        "queue_length": 3,
        "head": True,
        "round_trips": (("abcdefghijkl", 0.0123), ("mnopqrstuvwx", 0.00031)),
        "capacity": Capacity(8, ((1, 2345.0), (8, 700.5)), 43210.0, 12.5, 1.5, (Span(0, 3), Span(5, 8))),
        "wants": Span(0, 5),
        "zone": "cellar",
        "up_since": NOW - 3600.0,
        "reason": "it was the first",
    }
    return ServerInfo(**fields | changes)


def announcement(**changes: Any) -> Announcement:
    return Announcement.of(MODEL, info(), expires=NOW + 60).model_copy(update=changes)


def signed(body: object, identity: Identity = ALICE) -> bytes:
    """A record with this body and a valid signature."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return identity.sign(b"shoal announcement 2\0" + raw) + raw


def body(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = announcement().model_dump(mode="json")
    return fields | changes


def is_stored(
    value: bytes,
    *,
    key: str = shard_key(MODEL.key, FRONT),
    subkey: bytes | None = None,
    expires: float = NOW + 60,
    packed: Callable[[bytes], bytes] = pack,
) -> bool:
    """Whether a DHT node stores this record for other peers."""
    digest = routing.DHTID.generate(key).to_bytes()
    record = crypto.DHTRecord(digest, pack(ALICE.peer) if subkey is None else subkey, packed(value), expires)
    stored: bool = validator.validate(record)
    return stored


def test_an_announcement_is_read_as_it_was_made() -> None:
    opened = unseal(seal(ALICE, announcement()))
    assert opened is not None
    assert opened.server_info == info()
    assert opened.model_info == MODEL
    assert opened.expires == NOW + 60


def test_a_record_is_stored_in_its_bucket_and_in_the_list_of_models_only() -> None:
    record = seal(ALICE, announcement())
    assert is_stored(record, key=shard_key(MODEL.key, FRONT))
    assert not is_stored(record, key=shard_key(MODEL.key, Shard(1, 0, 0)))
    shard = registry_shard(ALICE.peer)
    assert is_stored(record, key=registry_key(shard))
    assert not is_stored(record, key=registry_key(shard + 1))
    assert not is_stored(record, key=shard_key("another", FRONT))
    assert not is_stored(record, key="anything else")


@pytest.mark.parametrize("level", range(1, 9))
def test_a_record_of_a_crowded_bucket_is_stored_in_its_own_shards_only(level: int) -> None:
    record = seal(ALICE, announcement(level=level))
    shards = {shard for each in range(9) for shard in shards_at(0, each)}
    stored = {shard for shard in shards if is_stored(record, key=shard_key(MODEL.key, shard))}
    assert stored == set(shards_of(ALICE.peer, 2, level))
    assert is_stored(record, key=registry_key(registry_shard(ALICE.peer))) == is_sampled(ALICE.peer, level)


def test_a_record_is_stored_under_its_own_peer_only() -> None:
    record = seal(ALICE, announcement())
    for subkey in pack(MALLORY.peer), pack(None), b"", pack(ALICE.peer.encode()), pack([ALICE.peer]):
        assert not is_stored(record, subkey=subkey)


def test_a_peer_cannot_announce_another() -> None:
    with pytest.raises(ValueError, match="announces itself"):
        seal(MALLORY, announcement())
    assert not is_stored(signed(body(), MALLORY))
    mallory = signed(body(peer=MALLORY.peer), MALLORY)
    assert unseal(mallory) is not None
    assert not is_stored(mallory)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_record_with_a_changed_byte_is_refused(position: int, flip: int) -> None:
    record = bytearray(seal(ALICE, announcement()))
    record[position % len(record)] ^= flip
    assert unseal(bytes(record)) is None


@given(st.binary(max_size=MAX_RECORD_BYTES))
def test_noise_is_refused_signed_or_not(noise: bytes) -> None:
    assert unseal(noise) is None
    assert unseal(signed(noise)) is None
    assert not is_stored(noise)
    assert not is_stored(noise, packed=bytes)


def test_a_speed_that_was_not_measured_yet_is_announced_as_absent() -> None:
    joining = info(state=ServerState.JOINING, decode_speed=None, prefill_speed=None)
    record = seal(ALICE, Announcement.of(MODEL, joining, expires=NOW + 60))
    read = unseal(record)
    assert read is not None
    assert read.server_info == joining
    assert is_stored(record)


def test_a_signature_for_something_else_does_not_count() -> None:
    raw = json.dumps(body()).encode()
    assert unseal(ALICE.sign(raw) + raw) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decode_speed", math.nan),
        ("decode_speed", math.inf),
        ("prefill_speed", -1.0),
        ("prefill_speed", 1e12),
        ("prefill_speed", "300"),
        ("cache_tokens_left", -1),
        ("cache_tokens_left", 1 << 60),
        ("cache_tokens_left", 1.5),
        ("queue_length", -1),
        ("queue_length", "long"),
        ("start", 5),
        ("start", -1),
        ("end", 17),
        ("level", -1),
        ("level", 9),
        ("level", "0"),
        ("end", 2),
        ("num_blocks", 0),
        ("num_blocks", 1 << 20),
        ("num_blocks", True),
        ("state", "dead"),
        ("expires", math.nan),
        ("expires", math.inf),
        ("expires", "soon"),
        ("peer", "somebody"),
        ("peer", None),
        ("model", ""),
        ("name", "x" * 1000),
        ("name", "\x1b[2J"),
        ("model_name", "a\nb"),
        ("fingerprint", 7),
        ("addresses", ["/ip4/1.2.3.4/tcp/1"] * 9),
        ("addresses", ["x" * 400]),
        ("addresses", "text"),
        ("encodings", ["int8"] * 9),
        ("encodings", ["x" * 17]),
        ("encodings", ["\x1b[2J"]),
        ("encodings", "int8"),
        ("round_trips", {"abc": 0.0}),
        ("round_trips", {"abc": -1.0}),
        ("round_trips", {"abc": 61.0}),
        ("round_trips", {"abc": math.nan}),
        ("round_trips", {"abc": math.inf}),
        ("round_trips", {"abc": "near"}),
        ("round_trips", {"": 0.1}),
        ("round_trips", {"x" * 13: 0.1}),
        ("round_trips", {"\x1b[2J": 0.1}),
        ("round_trips", {f"peer{index}": 0.1 for index in range(17)}),
        ("round_trips", [["abc", 0.1]]),
        ("pinned", "yes"),
        ("pinned", 1),
        ("wants", [3, 3]),
        ("wants", [-1, 3]),
        ("wants", [0, 17]),
        ("wants", [0]),
        ("wants", [0, 1.5]),
        ("wants", "0:4"),
        ("zone", "x" * 33),
        ("zone", "\x1b[2J"),
        ("zone", None),
        ("up_since", -1.0),
        ("up_since", math.inf),
        ("up_since", "today"),
        ("ready_at", math.nan),
        ("ready_at", 1e12),
        ("reason", "x" * 129),
        ("reason", "a\nb"),
        ("capacity", 7),
        ("capacity", []),
        ("capacity", {}),
    ],
)
def test_an_invalid_field_is_refused_even_with_a_valid_signature(field: str, value: object) -> None:
    assert unseal(signed(body())) is not None
    assert unseal(signed(body(**{field: value}))) is None


HOSTILE_CAPACITIES: list[dict[str, object]] = [
    {"max_blocks": 0},
    {"max_blocks": 1 << 20},
    {"max_blocks": 1.5},
    {"max_blocks": 17},
    {"block_speeds": []},
    {"block_speeds": [[length, 1.0] for length in range(MAX_SPEED_POINTS + 1)]},
    {"block_speeds": [[4, 1.0], [4, 1.0]]},
    {"block_speeds": [[4, 1.0], [2, 2.0]]},
    {"block_speeds": [[0, 1.0]]},
    {"block_speeds": [[1, 0.0]]},
    {"block_speeds": [[1, -1.0]]},
    {"block_speeds": [[1, math.nan]]},
    {"block_speeds": [[1, math.inf]]},
    {"block_speeds": [[1, 1e12]]},
    {"block_speeds": [[1, "fast"]]},
    {"block_speeds": [[1]]},
    {"block_speeds": [[1, 2.0], [17, 1.0]]},
    {"block_speeds": [[1, 1.0, 1.0]]},
    {"network_speed": 0.0},
    {"network_speed": -1.0},
    {"network_speed": math.inf},
    {"network_speed": 1e12},
    {"load_seconds": -1.0},
    {"load_seconds": math.nan},
    {"load_seconds": 1e9},
    {"load_seconds": None},
    {"disk_seconds": -1.0},
    {"disk_seconds": "soon"},
    {"on_disk": [[0, 1]] * (MAX_SPANS_ON_DISK + 1)},
    {"on_disk": [[3, 3]]},
    {"on_disk": [[4, 3]]},
    {"on_disk": [[-1, 3]]},
    {"on_disk": [[0, 1 << 20]]},
    {"on_disk": [[0]]},
    {"on_disk": [[0, 17]]},
    {"on_disk": "all"},
]


@pytest.mark.parametrize("change", HOSTILE_CAPACITIES)
def test_an_invalid_capacity_is_refused_even_with_a_valid_signature(change: dict[str, object]) -> None:
    capacity = body()["capacity"]
    assert unseal(signed(body(capacity=capacity | {"invented_later": 1}))) is not None
    assert unseal(signed(body(capacity=capacity | change))) is None


@pytest.mark.parametrize("field", ["max_blocks", "block_speeds", "network_speed", "load_seconds", "disk_seconds"])
def test_a_capacity_that_lacks_something_is_refused(field: str) -> None:
    capacity = {name: value for name, value in body()["capacity"].items() if name != field}
    assert unseal(signed(body(capacity=capacity))) is None


def test_a_server_may_announce_no_capacity_and_no_network_speed() -> None:
    without = [info(capacity=None), info(capacity=replace(info().capacity, network_speed=None, on_disk=()))]
    for each in without:
        read = unseal(seal(ALICE, Announcement.of(MODEL, each, expires=NOW + 60)))
        assert read is not None
        assert read.server_info == each


def test_a_record_says_which_protocol_its_server_speaks_and_one_that_does_not_is_of_version_8() -> None:
    read = unseal(seal(ALICE, Announcement.of(MODEL, info(protocol=9), expires=NOW + 60)))
    assert read is not None
    assert read.server_info.protocol == 9
    body = announcement().model_dump(mode="json")
    del body["protocol"]
    older = unseal(signed(body))
    assert older is not None
    assert older.server_info.protocol == 8


def test_a_missing_field_is_refused_and_an_unknown_one_is_not() -> None:
    incomplete = body()
    del incomplete["span" if "span" in incomplete else "start"]
    assert unseal(signed(incomplete)) is None
    assert unseal(signed(body(invented_later=1))) is not None


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b"{", b"\xff", b"[" * 3000])
def test_another_body_is_refused_even_with_a_valid_signature(raw: bytes) -> None:
    assert unseal(signed(raw)) is None


def test_an_oversized_record_is_neither_made_nor_read() -> None:
    with pytest.raises(ValueError, match="bytes"):
        seal(ALICE, announcement(name="x" * MAX_RECORD_BYTES))
    assert unseal(signed(body(padding="x" * MAX_RECORD_BYTES))) is None


def test_sixteen_neighbors_eight_relayed_addresses_and_a_full_capacity_fit_into_a_record() -> None:
    relay = f"/ip4/203.0.113.5/tcp/31337/p2p/{MALLORY.peer}/p2p-circuit/p2p/{ALICE.peer}"
    neighbors = tuple((f"{index:012d}", 1.23456789) for index in range(16))
    capacity = Capacity(
        max_blocks=4096,
        block_speeds=tuple((4000 + index, 123456.789) for index in range(MAX_SPEED_POINTS)),
        network_speed=987654.321,
        load_seconds=1234.5678,
        disk_seconds=123.45678,
        on_disk=tuple(Span(4000 + 2 * index, 4001 + 2 * index) for index in range(MAX_SPANS_ON_DISK)),
    )
    crowded = info(
        addresses=(relay,) * 8,
        round_trips=neighbors,
        name="x" * 128,
        reason="x" * 128,
        attention="y" * 128,
        zone="x" * 32,
        up_since=NOW,
        ready_at=NOW,
        capacity=capacity,
    )
    record = seal(ALICE, Announcement.of(replace(MODEL, num_blocks=4096), crowded, expires=NOW + 60))
    opened = unseal(record)
    assert opened is not None
    assert opened.server_info.round_trips == tuple((peer, 1.23457) for peer, _ in neighbors)
    assert opened.server_info.attention == "y" * 128


def test_a_round_trip_is_announced_with_at_least_ten_microseconds() -> None:
    near = Announcement.of(MODEL, info(round_trips=(("here", 1e-9),)), expires=NOW + 60)
    assert near.server_info.round_trips == (("here", 1e-5),)


def test_a_record_expires_when_it_says_and_within_the_longest_lifetime() -> None:
    record = seal(ALICE, announcement())
    for expires in NOW + 59, NOW + 61, math.nan, math.inf:
        assert not is_stored(record, expires=expires)
    longest = NOW + MAX_LIFETIME
    assert is_stored(seal(ALICE, announcement(expires=longest)), expires=longest)
    for expires in NOW - CLOCK_SKEW - 1, longest + CLOCK_SKEW + 1:
        assert not is_stored(seal(ALICE, announcement(expires=expires)), expires=expires)
        assert not is_timely(announcement(expires=expires), now=NOW)


@pytest.mark.parametrize(
    "packed", [bytes, lambda value: pack(value.hex()), lambda value: pack([value]), pack(b"").__add__]
)
def test_only_plain_bytes_are_unpacked(packed: Callable[[bytes], bytes]) -> None:
    assert not is_stored(seal(ALICE, announcement()), packed=packed)


def test_only_the_addresses_of_the_announcing_peer_count() -> None:
    elsewhere = f"/ip4/10.0.0.2/tcp/1/p2p/{MALLORY.peer}"
    opened = unseal(signed(body(addresses=[elsewhere, "nonsense"])))
    assert opened is not None
    assert opened.server_info.addresses == ()


def test_the_real_clock_is_used_unless_another_is_given() -> None:
    soon = time.time() + 60
    record = seal(ALICE, announcement(expires=soon))
    digest = routing.DHTID.generate(shard_key(MODEL.key, FRONT)).to_bytes()
    assert RecordValidator().validate(crypto.DHTRecord(digest, pack(ALICE.peer), pack(record), soon))
