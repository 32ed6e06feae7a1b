"""The limits of what one request can look up in the DHT, and store in it."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.dht import routing, storage
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from shoal.net.identity import Identity
from shoal.net.libp2p.hash_table import dht_limits
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.records import Announcement, seal, shard_key
from shoal.policy.census.levels import Shard

from .test_directory_records import MODEL, info

pytestmark = pytest.mark.anyio

pack = MSGPackSerializer.dumps
NO_PEER: Any = SimpleNamespace(remote_id=None)
MESSAGE_BYTES = 4 << 20


def expires() -> float:
    """A time at which a record may expire: records that live longer than five minutes are refused."""
    return math.ceil(time.time()) + 200.0


def protocol() -> Any:
    """The protocol of a DHT node, without a network."""
    made = dht_limits.LimitedDHTProtocol(_initialized_with_create=True)
    made.node_id = routing.DHTID.generate()
    made.node_info = dht_pb2.NodeInfo(node_id=made.node_id.to_bytes())
    made.bucket_size, made.num_replicas = 20, 5
    made.storage, made.cache = storage.DHTLocalStorage(), storage.DHTLocalStorage()
    made.routing_table = routing.RoutingTable(made.node_id, 20, 5)
    made.record_validator = RecordValidator()
    made.authorizer = None
    return made


def digest(bucket: int) -> Any:
    return routing.DHTID.generate(shard_key(MODEL.key, Shard(bucket, 0, 0)))


def fill(node: Any, *, records: int, bucket: int = 0, size: int = 4096) -> None:
    """Store this number of records of the largest size under one key. Their signatures do not matter here."""
    for number in range(records):
        node.storage.store_subkey(digest(bucket), f"peer {number}", bytes(size), expires())


def records_in(result: Any) -> dict[str, bytes]:
    if result.type == dht_pb2.NOT_FOUND:
        return {}
    return {subkey: value for subkey, (value, _) in MSGPackSerializer.loads(result.value).items()}


async def test_a_repeated_key_is_answered_once() -> None:
    node = protocol()
    fill(node, records=100)
    keys = [digest(0).to_bytes()] * 100
    answer = await node.rpc_find(dht_pb2.FindRequest(keys=keys), NO_PEER)
    assert [len(records_in(result)) for result in answer.results] == [100] + [0] * 99
    assert answer.ByteSize() < MESSAGE_BYTES / 2


async def test_a_lookup_of_too_many_keys_is_refused() -> None:
    keys = [bytes([number % 256, number // 256]) + bytes(18) for number in range(1100)]
    with pytest.raises(dht_limits.InvalidRequest):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=keys), NO_PEER)
    with pytest.raises(dht_limits.InvalidRequest):
        await protocol().rpc_find(dht_pb2.FindRequest(keys=[bytes(100_000)]), NO_PEER)


async def test_the_keys_of_a_lookup_divide_the_answer() -> None:
    node = protocol()
    for bucket in range(8):
        fill(node, records=300, bucket=bucket)
    answer = await node.rpc_find(dht_pb2.FindRequest(keys=[digest(bucket).to_bytes() for bucket in range(8)]), NO_PEER)
    numbers = [len(records_in(result)) for result in answer.results]
    assert min(numbers) >= 60
    assert answer.ByteSize() < MESSAGE_BYTES * 3 // 4


async def test_a_key_that_somebody_fills_takes_at_most_half_a_mebibyte() -> None:
    node = protocol()
    fill(node, records=1200)
    answer = await node.rpc_find(dht_pb2.FindRequest(keys=[digest(0).to_bytes()]), NO_PEER)
    assert len(records_in(answer.results[0])) > 100
    assert answer.ByteSize() <= 512 << 10


async def test_repeated_lookups_find_every_record_of_a_crowded_key() -> None:
    node = protocol()
    fill(node, records=1200)
    node.storage.store_subkey(digest(0), "honest", b"here", expires())
    request = dht_pb2.FindRequest(keys=[digest(0).to_bytes()])
    seen = [records_in((await node.rpc_find(request, NO_PEER)).results[0]) for _ in range(60)]
    assert any("honest" in each for each in seen)
    assert all(each for each in seen)


def store_request(*records: tuple[bytes, bytes, bytes, float]) -> Any:
    keys, subkeys, values, expires = zip(*records, strict=True)
    return dht_pb2.StoreRequest(
        keys=keys, subkeys=subkeys, values=values, expiration_time=expires, in_cache=[False] * len(keys)
    )


def record(identity: Identity) -> tuple[bytes, bytes, bytes, float]:
    until = expires()
    sealed = seal(identity, Announcement.of(MODEL, info(identity), expires=until))
    return digest(0).to_bytes(), pack(identity.peer), pack(sealed), until


async def test_valid_records_are_stored_one_by_one_and_handed_over_together() -> None:
    alice, bob = Identity.temporary(), Identity.temporary()
    node = protocol()
    assert (await node.rpc_store(store_request(record(alice), record(bob)), NO_PEER)).store_ok == [True, True]
    all_records = pack(node.storage.get(digest(0)).value)
    other = protocol()
    handover = store_request((digest(0).to_bytes(), node.IS_DICTIONARY, all_records, expires()))
    assert (await other.rpc_store(handover, NO_PEER)).store_ok == [True]
    answer = await other.rpc_find(dht_pb2.FindRequest(keys=[digest(0).to_bytes()]), NO_PEER)
    assert set(records_in(answer.results[0])) == {alice.peer, bob.peer}


async def test_only_the_first_records_of_a_request_are_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    node, validated = protocol(), []
    monkeypatch.setattr(node, "record_validator", SimpleNamespace(validate=lambda each: bool(validated.append(each))))
    answer = await node.rpc_store(store_request(*[(bytes(20), pack("peer"), b"x", expires())] * 3000), NO_PEER)
    assert len(validated) == dht_limits.MAX_STORED_RECORDS
    assert answer.store_ok == [False] * 3000
    crowd = storage.DictionaryDHTValue()
    for number in range(3000):
        crowd.store(f"{number}", b"x", expires())
    answer = await node.rpc_store(store_request((bytes(20), node.IS_DICTIONARY, pack(crowd), expires())), NO_PEER)
    assert len(validated) == 2 * dht_limits.MAX_STORED_RECORDS
    assert answer.store_ok == [False]


async def test_values_that_are_too_large_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    node, decoded = protocol(), []
    monkeypatch.setattr(node, "serializer", SimpleNamespace(loads=decoded.append))
    large = bytes(2 << 20)
    request = store_request((bytes(20), b"", large, expires()), (bytes(20), pack("peer"), large, expires()))
    assert (await node.rpc_store(request, NO_PEER)).store_ok == [False, False]
    assert not decoded


async def test_values_without_a_subkey_and_inconsistent_requests_are_refused() -> None:
    node = protocol()
    whole = store_request((digest(0).to_bytes(), node.IS_REGULAR_VALUE, b"mine alone", expires()))
    assert (await node.rpc_store(whole, NO_PEER)).store_ok == [False]
    with pytest.raises(dht_limits.InvalidRequest):
        await node.rpc_store(dht_pb2.StoreRequest(keys=[bytes(20)] * 2, values=[b"x"]), NO_PEER)
